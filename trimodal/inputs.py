"""What the model may be given, checked before it computes anything: shapes, number types, and numbers that cannot be
what was meant, such as images from 0 to 255 as floats. Each function raises ValueError.

Training does not call these: its steps encode by the towers themselves. Numbers are looked at only where there are any
(not in fake tensors, nor while a program is traced), and on a GPU that waits for them.

Shape suffixes: B samples, S pixels of a side, L tokens, T frames.
"""

import torch
from torch import Tensor

from trimodal.config import IMAGE_PATCH, NUM_MELS

IMAGE_RANGE = (-0.5, 1.5)  # of floats: bicubic and Lanczos overshoot 0 and 1 by less; standardised images by more
# Of natural-log mel power: ours has a floor of -13.8, those of others down to -28, and the loudest sound that is read
# comes to 40. Decibels, ten times as many for the same power less a factor of 2.3, go below.
LOG_MEL_RANGE = (-40.0, 45.0)


def check_images(images: Tensor, size: int | None = None) -> None:
    """Refuse images of another shape, integers other than uint8, and floats far beyond 0 to 1. `size`: of a side; None:
    a multiple of 16."""
    fits = images.ndim == 4 and images.shape[1] == 3 and all(
        side == size if size else side % IMAGE_PATCH == 0 for side in images.shape[2:])
    _check_shape("images", images, fits, f"[B, 3, {size}, {size}]" if size else "[B, 3, S, S] with S a multiple of 16")
    allowed = "expected uint8 from 0 to 255, or floats from 0 to 1 that are not standardised: the model does that"
    if not (images.dtype == torch.uint8 or images.is_floating_point()):
        raise ValueError(f"model: images are {images.dtype}; {allowed}")
    if images.is_floating_point() and not _within(images, *IMAGE_RANGE):
        raise ValueError(f"model: images are floats from {images.min():.4g} to {images.max():.4g}; {allowed}")


def check_ids(ids_BL: Tensor, mask_BL: Tensor | None, vocab_size: int, longest: int | None = None) -> None:
    """Refuse token ids of another shape or number type, a mask of another shape, ids outside the vocabulary, and texts
    of more than `longest` tokens (None: any)."""
    _check_shape("input_ids", ids_BL, ids_BL.ndim == 2 and (longest is None or ids_BL.shape[1] <= longest),
                 f"[B, L] with L at most {longest}" if longest else "[B, L]")
    if mask_BL is not None and mask_BL.shape != ids_BL.shape:
        raise ValueError(f"model: attention_mask has shape {list(mask_BL.shape)}, expected that of input_ids, "
                         f"{list(ids_BL.shape)}")
    if ids_BL.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"model: input_ids are {ids_BL.dtype}, expected int64 or int32")
    if not _within(ids_BL, 0, vocab_size - 1):
        raise ValueError(f"model: input_ids go from {ids_BL.min()} to {ids_BL.max()}, expected 0 to {vocab_size - 1}; "
                         "take the tokenizer that the checkpoint holds")


def check_audio(audio: Tensor, lengths_B: Tensor | None) -> None:
    """Refuse log-mels of another shape or number type, lengths that are no numbers of frames, and values that no
    log-mel has; what stands behind the lengths is not looked at."""
    check_frames(audio, lengths_B, NUM_MELS)
    _, T, _ = audio.shape
    real = audio
    if lengths_B is not None:
        real_BT = torch.arange(T, device=audio.device) < lengths_B[:, None]
        real = audio.where(real_BT[:, :, None], 0.0)
    if not _within(real, *LOG_MEL_RANGE):
        raise ValueError(f"model: audio holds numbers from {real.min():.4g} to {real.max():.4g}; expected natural-log "
                         "mels as audio.log_mel makes them (-13.8 and above, not in decibels)")


def check_frames(audio: Tensor, lengths_B: Tensor | None, num_bins: int) -> None:
    """Refuse sounds that are no frames of `num_bins` floats, and lengths that are no numbers of these frames."""
    _check_shape("audio", audio, audio.ndim == 3 and audio.shape[2] == num_bins, f"[B, T, {num_bins}]")
    if not audio.is_floating_point():
        raise ValueError(f"model: audio is {audio.dtype}, expected floats: log-mels as audio.log_mel makes them")
    B, T, _ = audio.shape
    if lengths_B is None:
        return
    if lengths_B.shape != (B,):
        raise ValueError(f"model: audio_lengths has shape {list(lengths_B.shape)}, expected [{B}]: frames of each")
    if not _within(lengths_B, 1, T):
        raise ValueError(f"model: audio_lengths go from {lengths_B.min()} to {lengths_B.max()}, expected 1 to {T}: "
                         "frames of 10 ms of the audio given, without padding")


def _within(values: Tensor, low: float, high: float) -> bool:
    """Whether all numbers are from low to high, and none is nan. True of tensors that hold no numbers: fake and meta
    tensors, and while torch.export, torch.compile or torch.jit follow a program."""
    if (type(values) not in (Tensor, torch.nn.Parameter) or values.device.type == "meta"
            or torch.compiler.is_compiling() or torch.jit.is_tracing()):
        return True
    smallest, largest = values.detach().aminmax()
    return bool((smallest >= low) & (largest <= high))


def _check_shape(name: str, value: Tensor, fits: bool, allowed: str) -> None:
    if not fits or value.numel() == 0:
        raise ValueError(f"model: {name} has shape {list(value.shape)}, expected {allowed}, nothing empty")
