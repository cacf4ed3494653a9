"""data/shakespeare.txt is what data/README.md says it is."""

import collections
import hashlib
import re

from conftest import ROOT, make_config

from chargpt.corpus import load_corpus

TEXT = (ROOT / "data" / "shakespeare.txt").read_text(encoding="ascii")
README = (ROOT / "data" / "README.md").read_text()
BLOCKS = TEXT.removesuffix("\n").split("\n\n")
SPEAKER = re.compile(r"(?:[A-Z][A-Z' -]+|[A-Z][a-z]+(?: (?:[A-Z][a-z]+|[A-Z]+))*):")
REFRAINS = {  # lines that Shakespeare repeats
    "'Who chooseth me must give and hazard all he hath.'",
    "'Who chooseth me shall gain what many men desire.'",
    "'Who chooseth me shall get as much as he deserves.'",
    "If this be so, why blame you me to love you?",
    "As, thou being mine, mine is thy good report.",
}
CHORUS = "All:\nDouble, double toil and trouble;\nFire burn and cauldron bubble."


def is_speech(block: str) -> bool:
    return "\n" in block and SPEAKER.fullmatch(block.split("\n")[0]) is not None


def test_size_and_digest_are_those_of_the_readme() -> None:
    assert len(TEXT) >= 300_000
    assert f"{len(TEXT):,} characters" in README
    assert hashlib.sha256(TEXT.encode()).hexdigest() in README


def test_characters_are_plain() -> None:
    assert set(TEXT) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ !'(),-.:;?\n")


def test_lines_are_short_and_without_stray_space() -> None:
    lines = TEXT.split("\n")
    assert max(map(len, lines)) <= 72
    assert all(line == line.strip() and "  " not in line for line in lines)
    assert "\n\n\n" not in TEXT and TEXT.endswith("\n") and not TEXT.startswith("\n")


def test_no_line_and_no_speech_occurs_twice() -> None:
    lines = collections.Counter(line for line in TEXT.split("\n") if len(line) > 40)
    assert {line for line, count in lines.items() if count > 1} == REFRAINS
    speeches = collections.Counter(block for block in BLOCKS if len(block) > 60)
    assert {block for block, count in speeches.items() if count > 1} == {CHORUS}


def test_all_154_sonnets_are_there_among_speeches() -> None:
    sonnets = [block for block in BLOCKS if not is_speech(block)]
    lengths = collections.Counter(len(sonnet.split("\n")) for sonnet in sonnets)
    assert lengths == {14: 152, 15: 1, 12: 1}
    assert all(len(sonnet) > 350 for sonnet in sonnets)


def test_no_headings_and_no_stage_directions() -> None:
    direction = re.compile(
        r"^(?:ACT|SCENE|Exit|Exeunt|Re-enter|Enter (?!, sir))\b(?!, sir)", re.MULTILINE
    )
    assert not direction.search(TEXT)


def test_the_validation_split_begins_with_a_complete_sonnet_and_holds_plays_too() -> None:
    corpus = load_corpus(make_config().dataset)
    train, val = corpus.tokenizer.decode(corpus.train), corpus.tokenizer.decode(corpus.val)
    assert train + val == TEXT
    assert train.endswith("\n\n") and len(val.split("\n\n")[0].split("\n")) == 14
    assert sum(is_speech(block) for block in val.strip().split("\n\n")) > 100
    assert (
        corpus.baselines["uniform"] > corpus.baselines["unigram"] > corpus.baselines["bigram"] > 2.0
    )
