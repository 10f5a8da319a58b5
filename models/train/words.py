"""The words the model is taught: captions drawn anew each time, and the tokenizer made from them."""

import json
import random
from pathlib import Path

from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer

from models.train.pictures import COLOURS
from models.train.sources import Emoji

LENGTH = 32  # tokens of a prompt, start and end included
VOCABULARY = 1800
START, END = "<|startoftext|>", "<|endoftext|>"
SENTENCES = (
    "a {}",
    "the {}",
    "one {}",
    "a picture of a {}",
    "a photo of a {}",
    "a drawing of {}",
    "an emoji of a {}",
    "{} emoji",
    "an icon of {}",
    "a small {}",
    "a nice {} on white",
    "draw me a {}",
)
# Words people put around a thing that change nothing in its picture: the model learns to look past them.
FILLERS = (
    *("big", "little", "tiny", "large", "cute", "pretty", "lovely", "fine", "simple", "real", "new", "young", "great"),
    *("good", "happy", "shiny", "bright", "modern", "classic", "typical", "famous", "tasty", "fresh", "clean"),
)
TAILS = (
    *("in the morning", "at night", "in summer", "in the city", "on a table", "on the street", "from the market"),
    *("for children", "for my friend", "with love", "from far away", "at home", "for the party", "in the garden"),
    *("to look at", "to play", "with details", "seen from the side", "in 3d", "please"),
)
# What CLIP's tokenizer splits text into (openai/CLIP, simple_tokenizer.py), without its special cases for contractions.
PIECES = r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def name(emoji: Emoji) -> str:
    """The concept's name in plain ASCII words."""
    return emoji.name.replace("\u2019", "'").replace("\u201c", "").replace("\u201d", "").replace("\u00f1", "n")


def caption(emoji: Emoji, colour: str | None, rng: random.Random) -> str:  # noqa: PLR0911  # one a way
    """One of the many ways to ask for this picture; empty one time in ten, for guidance to have a side to push from."""
    chance = rng.random()
    if chance < 0.1:
        return ""
    if colour:
        return _with_colour(name(emoji), colour, rng)
    if chance < 0.32:
        return name(emoji)
    if chance < 0.46:
        return _sentence(name(emoji), rng)
    tags = [t for t in emoji.keywords if t.isascii()]
    if not tags:
        return name(emoji)
    if chance < 0.82:
        tag = rng.choice(tags)
        return rng.choice((tag, tag, _sentence(tag, rng)))
    some = rng.sample(tags, min(len(tags), rng.randint(1, 3)))
    if chance < 0.92:
        some.insert(rng.randrange(len(some) + 1), name(emoji))
        return " ".join(some)
    joint = rng.choice((" of ", " with ", " and ", " "))
    return rng.choice(("a ", "the ", "")) + joint.join((some[0], name(emoji)))


def _sentence(what: str, rng: random.Random) -> str:
    if rng.random() < 0.4:
        return rng.choice(SENTENCES).format(what)
    words = [rng.choice(("a", "the", "one", "my", "some"))]
    words += rng.sample(FILLERS, rng.choice((0, 1, 1, 2)))
    words.append(what)
    if rng.random() < 0.5:
        words.append(rng.choice(TAILS))
    return " ".join(words)


def _with_colour(what: str, colour: str, rng: random.Random) -> str:
    plain = f"{colour} {what}"
    return rng.choice((plain, plain, f"a {plain}", f"the {plain}", f"a {what} in {colour}", f"{what}, {colour}"))


def make_tokenizer(kept: list[Emoji], folder: Path) -> CLIPTokenizer:
    """The tokenizer of `folder`; the first call learns it from the captions and writes vocab.json and merges.txt.

    What a text encoder began with stays: another order of the merges would give its tokens other numbers.
    """
    if not (folder / "vocab.json").exists():
        _learn(kept, folder)
    return CLIPTokenizer.from_pretrained(folder)


def _learn(kept: list[Emoji], folder: Path) -> None:
    corpus = [name(e) for e in kept] + [t for e in kept for t in e.keywords] + list(COLOURS) * 20
    letters = [chr(c) for c in range(33, 127)]
    corpus += [s.format("") for s in SENTENCES] * 20 + letters
    tokenizer = Tokenizer(BPE(end_of_word_suffix="</w>", unk_token=END))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = Sequence(
        [Split(Regex(PIECES), behavior="removed", invert=True), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        # Ties between merges go by number, and letters that end a word would be numbered in a random order.
        special_tokens=[START, END, *(f"{c}</w>" for c in letters if not c.isupper())],
        initial_alphabet=ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.model.save(str(folder))
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": LENGTH,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
