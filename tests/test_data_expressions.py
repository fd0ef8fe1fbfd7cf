"""The language of filters and captions: what it computes, and that it computes nothing else."""

from __future__ import annotations

import pytest

from stable_cascade.data.captions import caption_source
from stable_cascade.data.filters import Expression, apply_filters, parse_filters


@pytest.mark.parametrize(
    ("text", "value", "expected"),
    [
        ("identity", 3, 3),
        ("lambda s: s > 4.5", 4.6, True),
        ("lambda s: s < 0.01", 0.01, False),
        ("lambda w: 768 <= w < 1024 and w % 32 == 0", 800, True),
        ("lambda x: not (x in ['a', 'b']) or x == 'b'", "a", False),
        ("lambda j: j['a']['b'][-1]", {"a": {"b": [1, 2]}}, 2),
        ("lambda j: lower(j['c']) + ', ' + str(len(j['c']))", {"c": "DOG"}, "dog, 3"),
        ("lambda x: round(abs(min(x, -1.26)), 1) * 2 - 7 // 2", 5, 1.3 * 2 - 3),
        ("lambda x: 'big' if float(x) / 2 > 1 else 'small'", "3", "big"),
        ("lambda x: x is not None and x != 0", None, False),
        ("lambda x: x or 'none'", "", "none"),
    ],
)
def test_value(text, value, expected):
    assert Expression(text, "key")(value) == expected


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("lambda s: s.__class__", ".__class__"),
        ("lambda s: __import__('os').system('true')", "__import__"),
        ("lambda s: s.lower()", ".lower"),
        ("lambda s: open('x')", "open"),
        ("lambda s: print", "'print'"),
        ("lambda s: [x for x in s]", "ListComp"),
        ("lambda s: 9 ** 9 ** 9", "Pow"),
        ("lambda s: 1 << 99999999", "LShift"),
        ("lambda s: s[s]", "no constant"),
        ("lambda s: s[0:1]", "no constant"),
        ("lambda s: (lambda t: t)(s)", "call"),
        ("lambda s: len(*s)", "with keywords"),
        ("lambda s: max(s, key=len)", "with keywords"),
        ("lambda s: f'{s}'", "JoinedStr"),
        ("lambda s: (y := s)", "NamedExpr"),
        ("lambda s: b'a'", "literal"),
        ("lambda s, t: s", "one plain argument"),
        ("lambda s=1: s", "one plain argument"),
        ("lambda *s: s", "one plain argument"),
        ("s > 4", "neither identity nor a lambda"),
        ("lambda s: s >", "not a valid expression"),
        ("lambda s: " + "(" * 400 + "s" + ")" * 400, ""),
        ("lambda s: " + "s + " * 1000 + "s", "too long"),
    ],
)
def test_refusal_is_one_line_with_key_and_reason(text, named):
    with pytest.raises(ValueError) as error:
        Expression(text, "dataset_filters 'score'")
    message = str(error.value)
    assert "\n" not in message
    assert "dataset_filters 'score'" in message
    assert named in message


@pytest.mark.parametrize("text", ["lambda s: 'a' * 1000000000", "lambda s: [0] * s", "lambda s: '%99999999d' % s"])
def test_memory_bombs_do_not_go_off(text):
    with pytest.raises(TypeError, match="arithmetic on"):
        Expression(text, "key")(9)


def test_captions_getter_forms():
    content = {"caption": " a dog ", "n": 3}
    assert caption_source(None).from_bytes(b" a cat\n") == "a cat"
    assert caption_source(["txt", "identity"]).from_bytes("ä".encode()) == "ä"
    assert caption_source("caption").from_content(content) == "a dog"
    assert caption_source("lambda j: lower(j['caption'])").from_content(content) == "a dog"
    assert caption_source(["json", "lambda j: j['caption']"]).from_bytes(b'{"caption": "x"}') == "x"
    for getter in (["csv", "identity"], ["json", "identity"], ["txt"], ""):
        with pytest.raises(ValueError, match="captions_getter"):
            caption_source(getter)
    for getter in ("missing", "n"):
        with pytest.raises(ValueError, match="captions_getter"):
            caption_source(getter).from_content(content)


def test_filters_of_the_guide():
    filters = parse_filters([["aesthetic_score", "lambda s: s > 4.5"], ["nsfw_probability", "lambda s: s < 0.01"]])
    rows = [
        ('{"aesthetic_score": 5, "nsfw_probability": 0.0}', (8, 8)),
        ('{"aesthetic_score": 4, "nsfw_probability": 0.0}', (8, 8)),
        ('{"aesthetic_score": 9, "nsfw_probability": 0.5}', (8, 8)),
        ('{"aesthetic_score": null, "nsfw_probability": 0}', (8, 8)),
        ("", (8, 8)),
    ]
    keep, rejected = apply_filters(filters, rows)
    assert keep.tolist() == [True, False, False, False, False]
    assert rejected == [3, 2]


def test_filters_see_the_size_from_the_header():
    keep, _ = apply_filters(
        parse_filters([["width", "lambda w: w >= 768"]]), [("", (800, 1)), ('{"width": 5}', (800, 1))]
    )
    assert keep.tolist() == [True, False]


def test_filter_that_rejects_the_first_thousand():
    filters = parse_filters([["score", "lambda s: s > 1000"]])
    rows = ((f'{{"score": {i}}}', (8, 8)) for i in range(5000))
    with pytest.raises(ValueError, match=r"'score', 'lambda s: s > 1000'.* first 1,000 .*score = 0"):
        apply_filters(filters, rows)
    assert next(rows)[0] == '{"score": 1000}', "the rest was read although the error was certain"
    with pytest.raises(ValueError, match="none has this key"):
        apply_filters(parse_filters([["scor", "identity"]]), [('{"score": 1}', (8, 8))])


def test_filters_must_be_pairs():
    for wrong in (["score"], ["score", "lambda s: s", 3], "score"):
        with pytest.raises(ValueError, match="dataset_filters"):
            parse_filters([wrong])
