# SPDX-License-Identifier: MIT
"""Three built-in tasks, made of what every Python brings along.

    library     source of the standard library and of numpy; the embedded base was pretrained on it
    reference   the language reference in English (pydoc_data): a model of source code learns to write prose
    modules     a function's source and "# module: "; the completion is the package that the function comes from

Each is split by file or topic, so that no text, paragraph or prompt that validates is in training too.
"""

import ast
import os
import sysconfig
import textwrap
import tokenize
import zlib
from contextlib import suppress
from pathlib import Path

# The packages that `modules` tells apart; every Python has them. http is not one of them: its five files have so little
# in common that one half says nothing about the other. The base was pretrained without them and without http.
PACKAGES = ("asyncio", "email", "importlib", "logging", "multiprocessing", "unittest", "urllib", "xml")
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages"}


def library():
    """(training, validation) texts: the files of the standard library, and numpy's for training.

    One file in 20 is held out by a checksum of its path: the same files on every machine.
    """
    import numpy

    return [*source_files(Path(numpy.__file__).parent).values(), *standard_library(held_out=False)], known()


def known():
    """What `library` validates on: text of the kind that the embedded base knows, but has not seen."""
    return standard_library(held_out=True)


def standard_library(held_out):
    def is_wanted(path):
        left_out = path.split("/")[0] in (*PACKAGES, "http", "pydoc_data")
        return not left_out and (zlib.crc32(path.encode()) % 20 == 0) == held_out

    return [source for source in source_files(Path(sysconfig.get_path("stdlib")), is_wanted).values() if source]


def reference():
    """(training, validation) texts: the topics of the language reference; every fifth one is held out.

    Topics repeat one another, so a paragraph of a topic that is held out is taken out of all training texts.
    """
    from pydoc_data.topics import topics

    valid = [topics[name] for name in sorted(topics)[::5]]
    held_out = {paragraph for text in valid for paragraph in text.split("\n\n")}
    train = [[p for p in text.split("\n\n") if p not in held_out] for text in topics.values()]
    return ["\n\n".join(paragraphs) for paragraphs in train if paragraphs], valid


def modules():
    """(training, validation) lists of (prompt with a function, package): half the files each, no function in both."""
    train, valid = [], []
    for package in PACKAGES:
        files = source_files(Path(sysconfig.get_path("stdlib"), package)).values()
        functions = [[(f"{f[:800]}\n# module: ", package) for f in top_functions(source)] for source in files]
        counts = [0, 0]
        for found in sorted(functions, key=len, reverse=True):  # the largest file first: the halves even out
            to_valid = counts[0] > counts[1]
            (valid if to_valid else train).extend(found)
            counts[to_valid] += len(found)
    trained_on = {prompt for prompt, _ in train}
    return train, [(prompt, package) for prompt, package in valid if prompt not in trained_on]


def source_files(folder, is_wanted=lambda path: True):
    """{path relative to folder: source} of every .py file below it but tests and installed packages."""
    files, paths = {}, []
    for place, folders, names in os.walk(folder):
        folders[:] = {*folders} - NOT_LIBRARY  # walk enters those that are left
        paths += [Path(place, name) for name in names if name.endswith(".py")]
    for path in sorted(paths):
        name = path.relative_to(folder).as_posix()
        if path.name.startswith("_sysconfig") or not is_wanted(name):
            continue  # the first has paths of this machine
        with suppress(SyntaxError, UnicodeDecodeError, OSError), tokenize.open(path) as file:  # by its coding line
            files[name] = file.read()
    return files


def top_functions(source):
    """The source of functions and methods of three lines or more, at the top level or under class, if or try."""
    lines, found, stack = source.split("\n"), [], [ast.parse(source)]  # splitlines would count form feeds as well
    while stack:
        for node in ast.iter_child_nodes(stack.pop()):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno - node.lineno >= 2:
                found.append(textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])))
            elif isinstance(node, (ast.ClassDef, ast.If, ast.Try)):
                stack.append(node)
    return found


TASKS = {"library": library, "reference": reference, "modules": modules}


if __name__ == "__main__":
    for name, task in TASKS.items():
        train, valid = ([len("".join(text).encode()) for text in split] for split in task())
        print(f"{name}: {len(train):,} texts of {sum(train):,} bytes, and to validate {len(valid):,} of {sum(valid):,}")
