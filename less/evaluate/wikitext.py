"""Wikipedia's XML dump to clean prose, with the standard library alone.

What a reader of the page sees as running text is kept, a heading as a line of its own; templates,
tables, notes, pictures, formulas and the lists of sources at the end are dropped.
"""

from __future__ import annotations

import bz2
import html
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree.ElementTree import iterparse

# Sections from here on are lists of sources and links, not prose.
_APPENDICES = frozenset(
    """see also|references|notes|footnotes|notes and references|citations|sources|bibliography
    |further reading|external links|works cited|primary sources|secondary sources|gallery
    |filmography|discography""".replace("\n    ", "").split("|")
)
_ELEMENTS = (  # not prose: dropped with what they hold
    "ref|math|chem|gallery|timeline|imagemap|score|syntaxhighlight|source|hiero|table"
    "|noinclude|includeonly"
)
_DROPPED = re.compile(
    rf"<!--.*?-->|<(?:{_ELEMENTS})\b[^<>]*/>|<({_ELEMENTS})\b[^<>]*>.*?</\1\s*>",
    re.DOTALL | re.IGNORECASE,
)
_DROPPED_LINKS = re.compile(
    r"\s*:?(?:file|image|category|media|[a-z]{2,3}(?:-[a-z]+)?)\s*:", re.IGNORECASE
)
_HEADING = re.compile(r"^(={2,6})\s*(.*?)\s*\1\s*$")
# Templates whose argument is part of the sentence: name -> index of the argument that is read.
_SPOKEN = {"lang": 2, "transl": 2} | dict.fromkeys(
    ("nowrap", "nobr", "quote", "blockquote", "cquote", "small", "em", "strong", "val"),
    1,
)
_SPOKEN["as of"] = 1


def wikipedia_dump(path: Path) -> Iterator[tuple[str, str]]:
    """Articles of a bz2 dump, in its order: (title, the title, a blank line and the clean text).

    The dump is streamed, one page in memory at a time. Redirects and pages outside the article
    namespace are skipped.
    """
    with bz2.open(path) as stream:
        for _, element in iterparse(stream):
            namespace, _, tag = element.tag.rpartition("}")
            if tag != "page":
                continue
            prefix = namespace + "}" if namespace else ""
            title = element.findtext(prefix + "title") or ""
            markup = element.findtext(f"{prefix}revision/{prefix}text") or ""
            article = (element.findtext(prefix + "ns") or "0") == "0"
            redirect = element.find(prefix + "redirect") is not None
            element.clear()
            if article and not redirect and markup:
                yield title, f"{title}\n\n{clean(markup)}"


def clean(markup: str) -> str:
    """Running text of a page's wiki markup; paragraphs are separated by one blank line."""
    text = _DROPPED.sub("", markup)
    text = _replace_nested(text, {"{{": ("}}", _template), "[[": ("]]", _link)})
    text = _replace_nested(text, {"{|": ("|}", lambda _: "")})
    text = re.sub(r"\[(?:https?:|ftp:)?//[^\s\]]+\s*([^\]]*)\]", r"\1", text)
    text = re.sub(r"<br\s*/?>|</?p\b[^<>]*>", " ", text, flags=re.IGNORECASE)
    text = re.sub(r"</?[a-zA-Z][^<>]*>", "", text)
    text = re.sub(r"'{2,5}", "", text)
    text = html.unescape(text).replace("\xa0", " ")
    text = re.sub(r"__[A-Z]+__", "", text)
    return _tidy("\n".join(_lines(text)))


def _lines(text: str) -> Iterator[str]:
    """Lines of prose and headings, up to the appendices; headings over nothing are dropped."""
    heading: tuple[int, str] | None = None
    skipped_level = 0  # inside an appendix of this heading level
    for line in text.split("\n"):
        match = _HEADING.match(line)
        if match:
            level, name = len(match[1]), match[2]
            if skipped_level and level > skipped_level:
                continue
            skipped_level = level if name.lower() in _APPENDICES else 0
            heading = None if skipped_level else (level, name)
            continue
        if skipped_level:
            continue
        line = line.strip()
        if line.startswith(
            ("|", "!", "{", "}", "File:", "Image:")
        ):  # left over of a table that was not balanced
            continue
        line = line.lstrip("*#:; ").strip()
        if line and heading:
            yield ""
            yield heading[1]
            yield ""
            heading = None
        yield line


def _tidy(text: str) -> str:
    text = re.sub(r"[ \t]+", " ", text)
    for _ in range(2):  # what a dropped template leaves: "( ; , born", "()"
        text = re.sub(r"\(\s*(?:[,;:\u2013]\s*)+", "(", text)
        text = re.sub(r"(?:\s*[,;:])*\s*\)", ")", text)
        text = re.sub(r" ?\( ?\)", "", text)
    text = re.sub(r" +([,.;:])(?=\s|$)", r"\1", text)
    text = re.sub(r" *\n *", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _replace_nested(text: str, rules: dict[str, tuple[str, Callable[[str], str]]]) -> str:
    """Replace every balanced ``opening … closing``, the innermost first; lone marks are dropped.

    Args:
        text: to work on.
        rules: opening -> (closing, function from what stands between them to what replaces both).
    """
    closings = {closing: opening for opening, (closing, _) in rules.items()}
    marker = re.compile("|".join(re.escape(m) for m in [*rules, *closings]))
    stack: list[tuple[str, list[str]]] = [("", [])]  # (opening, pieces since)
    last = 0
    for match in marker.finditer(text):
        stack[-1][1].append(text[last : match.start()])
        last = match.end()
        if match[0] in rules:
            stack.append((match[0], []))
            continue
        opening = closings[match[0]]
        if all(waiting != opening for waiting, _ in stack):
            continue
        while True:  # whatever was opened inside and never closed is plain text
            waiting, pieces = stack.pop()
            inner = "".join(pieces)
            stack[-1][1].append(rules[opening][1](inner) if waiting == opening else inner)
            if waiting == opening:
                break
    stack[-1][1].append(text[last:])
    return "".join(piece for _, pieces in stack for piece in pieces)


def _link(inner: str) -> str:
    target, _, label = inner.partition("|")
    if _DROPPED_LINKS.match(target):
        return ""
    return label.rpartition("|")[2] or re.sub(r"^\s*:?(?:wikt:(?:[a-z]{2}:)?)?", "", target)


def _template(inner: str) -> str:
    fields = [field.strip() for field in inner.split("|")]
    name = fields[0].lower()
    named = re.compile(r"[a-z_ ]+\d*\s*=", re.IGNORECASE)
    plain = [field for field in fields[1:] if not named.match(field)]
    if name in ("convert", "cvt") and len(plain) >= 2:
        if plain[1] in ("to", "-", "\u2013", "and") and len(plain) >= 4:
            return " ".join(plain[:4])
        return f"{plain[0]} {plain[1]}"
    if name in ("ndash", "spaced ndash", "snd", "mdash", "spd"):
        return " \u2013 "
    index = 1 if name.startswith("lang-") else _SPOKEN.get(name, 0)
    return plain[index - 1] if 0 < index <= len(plain) else ""
