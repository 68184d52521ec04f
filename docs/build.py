# SPDX-License-Identifier: MIT
"""Builds the pages: python docs/build.py makes site/ (English) and site/zh/ (Chinese), to be opened from the disk.

    pip install -e ".[docs]" && python docs/build.py
    python docs/build.py --english      without a check of the translation, while one writes
    python docs/build.py --update       after a change in English: brings docs/locale/ up to date, and lists what is
                                        to be translated

First docs/figures/ runs the library and draws. Then Sphinx runs once for each language, where every warning is an
error. Every number, excerpt and figure on a page comes from code that runs here. Last, all links are followed.
"""

import html
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

from babel.messages.pofile import read_po, write_po

DOCS = Path(__file__).parent
MADE, SITE, CATALOGS = DOCS / "made", DOCS.parent / "site", DOCS / "locale" / "zh_CN" / "LC_MESSAGES"
KEPT = re.compile(r"`[^`]+`|\$[^$]+\$|\]\([^)]+\)")  # code, formulas and links: the same in both languages
SAME = re.compile(r"\\(begin|end|operatorname|mathrm|text){\w+}|\\[a-zA-Z]+")  # LaTeX
PUNCTUATION = re.compile("[\u4e00-\u9fff][,;:?!()]|[,;:?!(][\u4e00-\u9fff]| [，。；：、（）]|[，。；：、（）] ")


def sphinx(builder, out, language="en"):
    settings = ["-D", f"language={language}", "-d", MADE / f"doctrees-{language}-{builder}", "-c", DOCS]
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-E", "-b", builder, *settings]
    if subprocess.run([*map(str, command), DOCS / "pages", out]).returncode:
        raise SystemExit(f"docs/build.py: {builder}, {language}: what Sphinx says above is to be mended")


def read(path):
    with path.open("rb") as file:
        return read_po(file, locale="zh_CN")


def catalogs():
    """(path, catalog with English as it is now, and what is translated of it) of each page."""
    shutil.rmtree(MADE / "gettext", ignore_errors=True)
    sphinx("gettext", MADE / "gettext")
    for template in sorted((MADE / "gettext").glob("*.pot")):
        path = CATALOGS / f"{template.stem}.po"
        with template.open("rb") as file:
            new = read_po(file)
        catalog = read(path) if path.exists() else read_po([], locale="zh_CN")
        catalog.update(new, no_fuzzy_matching=False)
        catalog.obsolete.clear()
        yield path, catalog


def update():
    """Brings the catalogs up to date."""
    CATALOGS.mkdir(parents=True, exist_ok=True)
    for path, catalog in catalogs():
        catalog.header_comment = "# Translations for nanopeft."
        with path.open("wb") as file:
            write_po(file, catalog, omit_header=True, width=0, no_location=True, ignore_obsolete=True)


def has_words(text):
    return not text.startswith("nanopeft/") and re.search("[A-Za-z]{3}", SAME.sub("", KEPT.sub("", text)))


def untranslated():
    """A line on each text whose translation is missing, stale, or says something else in code, formulas or links."""
    for path, catalog in catalogs():
        for message in catalog:
            source, target = message.id, message.string
            if not source or (not target and not has_words(source)):  # formulas and numbers are the same
                continue
            where = f"{path.name}: {source[:70]!r}"
            if not target:
                yield f"{where} is not translated"
            elif message.fuzzy:
                yield f"{where}: the English has changed; mend the translation and remove 'fuzzy'"
            elif sorted(KEPT.findall(source)) != sorted(KEPT.findall(target)):
                yield f"{where}: code, formulas or links differ"
            elif found := PUNCTUATION.search(KEPT.sub("x", target)):
                yield f"{where}: {found[0]!r} has half-width punctuation, or a space beside full-width"


def broken_links():
    """A line on each link that leaves the site, or leads nowhere in it."""
    pages = {path.resolve(): path.read_text("utf-8") for path in SITE.rglob("*.html")}
    ids = {path: {*re.findall(r'\bid="([^"]+)"', text)} for path, text in pages.items()}
    for path, text in pages.items():
        for link in map(html.unescape, re.findall(r'<[^>]+\b(?:href|src)="([^"]+)"', text)):
            parts = urlsplit(link)
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if parts.scheme or parts.netloc:
                if parts.scheme != "data":
                    yield f"{path.relative_to(SITE)} refers outside: {link}"
            elif not target.exists() or (parts.fragment and parts.fragment not in ids.get(target, parts.fragment)):
                yield f"{path.relative_to(SITE)}: {link} leads nowhere"


def main():
    from calculator import script
    from figures import draw_all

    draw_all(MADE / "figures")
    (MADE / "calculator-data.js").write_text(script(), "utf-8")
    if "--update" in sys.argv:
        update()
    if "--english" not in sys.argv and (problems := [*untranslated()]):
        raise SystemExit("\n".join(problems))
    shutil.rmtree(SITE, ignore_errors=True)
    sphinx("html", SITE)
    sphinx("html", SITE / "zh", "zh_CN")
    if problems := [*broken_links()]:
        raise SystemExit("\n".join(problems))
    size = sum(path.stat().st_size for path in SITE.rglob("*") if path.is_file())
    print(f"site/index.html, site/zh/index.html: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
