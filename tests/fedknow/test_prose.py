"""The documents are in plain English, as far as counting can tell."""

import re
from pathlib import Path
from statistics import fmean

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md")
    for path in ROOT.glob(pattern)
)
"""All that is written by hand; the site's generated pages are in no folder."""
LONGEST = 25
"""Words of a sentence at most."""
AVERAGE = 15
SHORTEST = 3
"""Fewer words are a label ("Precision."), which would flatter the average."""
BOUNDARY = re.compile(r"""(?:(?<=[.!?])|(?<=[.!?][)"']))\s+(?=[("']?[A-Z0-9`])""")
GENERATED = re.compile(r"<!-- (\w+) -->.*?<!-- /\1 -->", re.DOTALL)
"""Tables that a program fills, with the commands that measured them."""
FOOTNOTE = re.compile(r"\[\^[\w-]+\]:?")
HEADLESS = re.compile(r"\W*(What|Of)\b(?!.*\?$)")


def paragraphs(text):
    """The prose of a page: no headings, tables, code blocks, HTML or generated lines."""
    skipped = {"heading_open", "table_open"}
    closing = {"heading_close", "table_close"}
    depth = 0
    for token in (
        MarkdownIt("commonmark")
        .enable("table")
        .parse(FOOTNOTE.sub("", GENERATED.sub("", text)))
    ):
        depth += (token.type in skipped) - (token.type in closing)
        if token.type == "inline" and not depth:
            yield "".join(plain(child) for child in token.children)


def plain(token):
    """A piece of a paragraph without its marks; those of code stay."""
    if token.type in ("softbreak", "hardbreak"):
        return " "
    if token.type == "code_inline":
        return f"`{token.content}`"
    return token.content if token.type == "text" else ""


def sentences(text):
    """The sentences of a page, each with its words."""
    parts = [
        part
        for paragraph in paragraphs(text)
        for part in BOUNDARY.split(paragraph)
    ]
    return [part for part in parts if len(part.split()) >= SHORTEST]


def test_sentences_are_told_apart():
    page = (
        "# A heading of more than three words\n\n"
        "**A label.** One is 0.5 s long (`a`). `two`\nis [linked](x.md), and longer.\n\n"
        "```sh\ncode is no prose at all\n```\n\n| a table | is none "
        "|\n|---|---|\n| either | way |\n\n"
        "<!-- a comment is none -->\n\n<!-- name -->\nA program wrote it.\n<!-- /name -->\n\n"
        "- Three is an item.\n- Four is another one\n"
    )
    assert sentences(page) == [
        "One is 0.5 s long (`a`).",
        "`two` is linked, and longer.",
        "Three is an item.",
        "Four is another one",
    ]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_sentences_are_short(name):
    found = sentences((ROOT / name).read_text("utf-8"))
    too_long = [sentence for sentence in found if len(sentence.split()) > LONGEST]
    assert not too_long
    assert fmean(len(sentence.split()) for sentence in found) <= AVERAGE


@pytest.mark.parametrize("name", DOCUMENTS)
def test_no_sentence_begins_with_a_headless_clause(name):
    found = sentences((ROOT / name).read_text("utf-8"))
    assert [sentence for sentence in found if HEADLESS.match(sentence)] == []
