"""A CLIP ViT-B/32 of random weights as infinity-emb wants it: `PYTHON benchmarks/serving/infinity_model.py FOLDER`.

In Hugging Face's layout, with the vocabulary that open_clip brings along; to be run in infinity's own environment.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

from open_clip import tokenizer
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizerFast

VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
# Bytes, the same at the end of a word, and the two marks: what the vocabulary has beside merged pairs.
NUM_UNMERGED = 256 + 256 + 2
NAMES = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    encoder = tokenizer.SimpleTokenizer().encoder
    lines = gzip.decompress((Path(tokenizer.__file__).parent / VOCABULARY).read_bytes()).decode().split("\n")
    merges = lines[1 : len(encoder) - NUM_UNMERGED + 1]
    vocabulary, pairs = folder / "vocab.json", folder / "merges.txt"
    vocabulary.write_text(json.dumps({NAMES.get(token, token): number for token, number in encoder.items()}))
    pairs.write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    CLIPModel(CLIPConfig()).save_pretrained(folder)
    tokens = CLIPTokenizerFast(vocab_file=str(vocabulary), merges_file=str(pairs))
    CLIPProcessor(CLIPImageProcessor(), tokens).save_pretrained(folder)


if __name__ == "__main__":
    main()
