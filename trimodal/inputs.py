"""What the model may be given, checked before it computes anything: shapes, number types, and numbers that cannot be
what was meant, such as pictures from 0 to 255 as floats.

    checked_images(images), checked_ids(input_ids, attention_mask, vocab_size), checked_audio(audio, audio_lengths)

Training does not come by here: its steps encode by the towers themselves. Numbers are looked at only where there are
any (not in fake tensors, nor while a program is traced), and on a GPU that waits for them.
"""

import torch
from torch import Tensor

from trimodal.config import NUM_MELS

SIDE = 16  # sides of a picture are multiples of it
LOWEST, HIGHEST = -0.5, 1.5  # of floats: bicubic and Lanczos overshoot 0 and 1 by less; standardised pictures by more
# Of natural-log mel power: ours has a floor of -13.8, those of others down to -28, and the loudest sound that is read
# comes to 40. Decibels, ten times as many for the same power less a factor of 2.3, go below.
QUIETEST, LOUDEST = -40.0, 45.0


def checked_images(images: Tensor) -> Tensor:
    """The same pictures, if model.forward takes such.

    Raises:
        ValueError: another shape, integers other than uint8, or floats far beyond 0 to 1.
    """
    fits = images.ndim == 4 and images.shape[1] == 3 and not any(side % SIDE for side in images.shape[2:])
    _check_shape("images", images, fits, "[B, 3, S, S] with S a multiple of 16")
    if images.dtype == torch.uint8:
        return images
    allowed = "expected uint8 from 0 to 255, or floats from 0 to 1 that are not standardised: the model does that"
    if not images.is_floating_point():
        raise ValueError(f"model: images are {images.dtype}; {allowed}")
    if has_numbers(images):
        low, high = _numbers(*images.detach().aminmax())
        if not (low >= LOWEST and high <= HIGHEST):  # neither is true of nan
            raise ValueError(f"model: images are floats from {low:.4g} to {high:.4g}; {allowed}")
    return images


def checked_ids(input_ids: Tensor, attention_mask: Tensor | None, vocab_size: int) -> Tensor:
    """The same token ids, if model.forward takes such with such a mask.

    Raises:
        ValueError: another shape or number type, or an id that the vocabulary does not have.
    """
    _check_shape("input_ids", input_ids, input_ids.ndim == 2, "[B, L]")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(f"model: attention_mask has shape {list(attention_mask.shape)}, expected that of input_ids, "
                         f"{list(input_ids.shape)}")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"model: input_ids are {input_ids.dtype}, expected int64 or int32")
    if has_numbers(input_ids):
        low, high = torch.stack(input_ids.aminmax()).tolist()
        if low < 0 or high >= vocab_size:
            raise ValueError(f"model: input_ids go from {low} to {high}, expected 0 to {vocab_size - 1}; take the "
                             "tokenizer that the checkpoint holds")
    return input_ids


def checked_audio(audio: Tensor, audio_lengths: Tensor | None) -> Tensor:
    """The same log-mels, if model.forward takes such with such lengths; what stands behind these is not looked at.

    Raises:
        ValueError: another shape or number type, lengths that are no numbers of frames, or numbers that no log-mel has.
    """
    _check_shape("audio", audio, audio.ndim == 3 and audio.shape[2] == NUM_MELS, f"[B, T, {NUM_MELS}]")
    if not audio.is_floating_point():
        raise ValueError(f"model: audio is {audio.dtype}, expected floats: log-mels as audio.log_mel makes them")
    B, T, _ = audio.shape
    if audio_lengths is not None and audio_lengths.shape != (B,):
        raise ValueError(f"model: audio_lengths has shape {list(audio_lengths.shape)}, expected [{B}]: frames of each")
    if not has_numbers(audio):
        return audio
    lengths_B = torch.full((B,), T, device=audio.device) if audio_lengths is None else audio_lengths
    real_BT = torch.arange(T, device=audio.device) < lengths_B[:, None]
    low, high = audio.detach().where(real_BT[:, :, None], 0.0).aminmax()
    quietest, loudest, shortest, longest = _numbers(low, high, *lengths_B.aminmax())
    if shortest < 1 or longest > T:
        raise ValueError(f"model: audio_lengths go from {shortest:.0f} to {longest:.0f}, expected 1 to {T}: frames of "
                         "10 ms of the audio given, without padding")
    if not (quietest >= QUIETEST and loudest <= LOUDEST):
        raise ValueError(f"model: audio holds numbers from {quietest:.4g} to {loudest:.4g}; expected natural-log mels "
                         "as audio.log_mel makes them (-13.8 and above, not in decibels)")
    return audio


def has_numbers(value: Tensor) -> bool:
    """False of fake and meta tensors, and while torch.export, torch.compile or torch.jit follow a program."""
    return (type(value) in (Tensor, torch.nn.Parameter) and value.device.type != "meta"
            and not torch.compiler.is_compiling() and not torch.jit.is_tracing())


def _numbers(*values: Tensor) -> list[float]:
    """Brought to the host together. In float32, since CPU autocast refuses to stack float16."""
    return [float(value) for value in torch.stack([value.float() for value in values]).tolist()]


def _check_shape(name: str, value: Tensor, fits: bool, allowed: str) -> None:
    if not fits or value.numel() == 0:
        raise ValueError(f"model: {name} has shape {list(value.shape)}, expected {allowed}, nothing empty")
