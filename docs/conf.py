# SPDX-License-Identifier: MIT
"""Sphinx's settings, and what a page can say beyond Markdown: {source}, {run}, {n} and {test}."""

import contextlib
import io
import sys
from pathlib import Path

import math_core
from docutils import nodes
from docutils.parsers.rst import Directive, directives
from docutils.statemachine import StringList
from sphinx.directives.code import LiteralInclude
from sphinx.errors import ExtensionError
from sphinx.search import SearchLanguage

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

project, author, language = "nanopeft", "nanopeft's authors", "en"
extensions = ["myst_parser"]
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
html_theme, html_title = "furo", "nanopeft"
html_static_path, html_css_files = ["static", "made/calculator-data.js"], ["style.css"]
html_use_index = html_show_sourcelink = html_show_search_summary = html_copy_source = False  # search cannot fetch on file://
html_theme_options = {"navigation_with_keys": True}
templates_path = ["templates"]
html_sidebars = {
    "**": ["sidebar/brand.html", "language.html", "sidebar/search.html", "sidebar/scroll-start.html",
           "sidebar/navigation.html", "sidebar/scroll-end.html"],
}  # fmt: skip
locale_dirs, gettext_compact, gettext_location, gettext_uuid = ["../locale"], False, False, False


class Source(LiteralInclude):
    """```{source} lora.LoRALinear.update``` shows a function or a class of the library, by its name."""

    def run(self):
        module, _, name = self.arguments[0].partition(".")
        caption = f"nanopeft/{module}.py" + f": {name}" * bool(name)
        self.arguments[0] = f"/../../nanopeft/{module}.py"
        self.options |= {"dedent": None, "language": "python", "caption": self.options.get("caption", caption)}
        if name:
            self.options["pyobject"] = name
        return super().run()


def names(env):
    """The variables of the page that is being read."""
    return env.temp_data.setdefault("names", {})


class Run(Directive):
    """```{run}``` runs its lines and shows them with what they print; {n}`x` in the text shows the value of x."""

    has_content, option_spec = True, {"hidden": directives.flag, "table": directives.flag}

    def run(self):
        code, printed = "\n".join(self.content), io.StringIO()
        env = self.state.document.settings.env
        with contextlib.redirect_stdout(printed):
            exec(compile(code, f"{env.docname}, line {self.lineno}", "exec"), names(env))
        if "hidden" in self.options:
            return []
        if "table" in self.options:  # what it prints is Markdown
            table = nodes.container()
            table.document = self.state.document  # gives its cells a source, without which they are not translated
            self.state.nested_parse(StringList(printed.getvalue().splitlines()), 0, table)
            return [table]
        shown = [nodes.literal_block(code, code, language="python")]
        if text := printed.getvalue():
            shown.append(nodes.literal_block(text, text, language="text", classes=["printed"]))
        return shown


def number(name, rawtext, text, lineno, inliner, options=None, content=()):
    """{n}`trained` or {n}`100 * part:.1f`: a value of the page's variables; whole numbers have commas."""
    expression, _, form = text.rpartition(":") if ":" in text and "[" not in text.rpartition(":")[2] else (text, "", "")
    value = eval(expression, names(inliner.document.settings.env))
    return [nodes.Text(format(value, form or ("," if type(value) is int else "")))], []


def test(name, rawtext, text, lineno, inliner, options=None, content=()):
    """{test}`test_lora.test_merging_changes_nothing`: a test that stands behind a sentence; it has to exist."""
    module, _, function = text.rpartition(".")
    if f"def {function}(" not in (ROOT / "tests" / f"{module.replace('.', '/')}.py").read_text("utf-8"):
        raise ExtensionError(f"{inliner.document.settings.env.docname}: there is no test {text}")
    return [nodes.literal(text, f"tests/{module.replace('.', '/')}.py::{function}", classes=["test"])], []


class Chinese(SearchLanguage):
    """Pairs of characters, since Chinese words have no spaces between them."""

    lang, language_name, js_stemmer_code = "zh", "Chinese", "var Stemmer = function () { this.stemWord = w => w; };"
    js_splitter_code = """function splitQuery(query) {
      return query.split(/[^\\p{L}\\p{N}_]+/u).flatMap(w => /[\\u4e00-\\u9fff]/.test(w) && w.length > 2
        ? [...w].slice(1).map((c, i) => w[i] + c) : [w]).filter(w => w);
    }"""

    def split(self, text):
        words = []
        for word in super().split(text):
            chinese = any("\u4e00" <= c <= "\u9fff" for c in word) and len(word) > 2
            words += [word[i : i + 2] for i in range(len(word) - 1)] if chinese else [word]
        return words

    def word_filter(self, word):
        return len(word) > 1


def mathml(display):
    def visit(translator, node):
        try:
            found = math_core.LatexToMathML().convert_with_local_state(node.astext(), displaystyle=display)
        except math_core.LatexError as error:
            raise ExtensionError(f"{translator.builder.current_docname}: {node.astext()}: {error}") from None
        translator.body.append(found)
        raise nodes.SkipNode

    return visit, None


def setup(app):
    app.add_html_math_renderer("mathml", mathml(False), mathml(True))
    app.config.html_math_renderer = "mathml"
    app.add_directive("source", Source)
    app.add_directive("run", Run)
    app.add_role("n", number)
    app.add_role("test", test)
    app.add_search_language(Chinese)
