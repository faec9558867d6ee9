"""Code on the pages, as a reader of Markdown sees it, and what runs or checks it."""

import argparse
import glob
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from mmengine.config import Config
from mmengine.registry import HOOKS, init_default_scope

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ('README.md', 'CONTRIBUTING.md', 'CHANGELOG.md')),
    *sorted((ROOT / 'docs').rglob('*.md')),
]
FOLDERS = 'benchmarks', 'configs', 'docs', 'examples', 'mmprune', 'tests', 'tools'


@dataclass(frozen=True)
class Block:
    """A block of code or, where ``inline``, a span of it; ``line`` counts from 1, ``section`` is the
    heading above it."""

    page: Path
    line: int
    section: str
    language: str
    text: str
    inline: bool = False

    def __str__(self) -> str:
        return f'{self.page.relative_to(ROOT)}:{self.line}'


def blocks(page: Path) -> list[Block]:
    """All code on a page, in order; directives of the site (``{toctree}``) aside."""
    found, section, before = [], '', ''
    for token in MarkdownIt().parse(page.read_text()):
        line = (token.map or [0])[0] + 1
        if before == 'heading_open':
            section = token.content
        before = token.type
        if token.type == 'fence' and not token.info.startswith('{'):
            found.append(Block(page, line + 1, section, token.info.strip(), token.content))
        elif token.type == 'code_block':
            found.append(Block(page, line, section, '', token.content))
        for child in token.children or ():
            if child.type == 'code_inline':
                found.append(Block(page, line, section, '', child.content, inline=True))
    return found


# --- Python -------------------------------------------------------------------------------------------


def is_config(block: Block) -> bool:
    return bool(re.search(r'^(_base_|custom_hooks|custom_imports) = ', block.text, re.MULTILINE))


def run(block: Block, scope: dict[str, Any]) -> None:
    """Run a block as it stands, an error in it having the page's line; a config is loaded, its hooks
    are made, and it is left under the name that its first line may give (``# my_config.py``)."""
    if not is_config(block):
        exec(compile('\n' * (block.line - 1) + block.text, str(block.page), 'exec'), scope)
        return
    name = re.match(r'# (\w+\.py)', block.text)
    path = Path(name[1] if name else 'config.py')
    path.write_text(block.text)
    config = Config.fromfile(path)
    init_default_scope(config.get('default_scope') or 'mmengine')
    for hook in config.get('custom_hooks', []):
        HOOKS.build(hook)


# --- commands -----------------------------------------------------------------------------------------

PROGRAMS = 'python', 'pip', 'make', 'pytest', 'torchrun', 'pre-commit', 'sphinx-build'
_COMMAND = re.compile(rf'(?:[A-Z_]+=\S+ )*(?:(?:{"|".join(PROGRAMS)}) |tools/\S+\.sh |\./)')


def commands(block: Block) -> Iterator[str]:
    """The commands in a block, one line each: all lines of a ``bash`` block; of one without a language,
    where output stands too, the lines that start with a program that is known."""
    text = re.sub(r'\s*\\\n\s*', ' ', block.text)
    for line in text.splitlines():
        line = re.sub(r'(^|\s+)#\s.*', '', line).strip()
        if line and (block.language == 'bash' or (not block.language and _COMMAND.match(line))):
            yield from (part.strip() for part in re.split(r' && | \| |; ', line))


def words_of(command: str) -> list[str]:
    """A command's words: of a synopsis all that is optional, and of alternatives the first."""
    command = re.sub(r'(?<=\s)\[([^]-][^]]*)\]', '', command)
    command = re.sub(r'(?<=\s)\[(-[^]]*)\]', r'\1', command)
    command = re.sub(r'(--cfg-options) \.\.\.', r'\1 key=value', command)
    words = shlex.split(re.sub(r' >+ ?\S+$', '', command))
    while words and re.fullmatch(r'[A-Z_]+=\S*', words[0]):
        del words[0]
    return [word.partition('|')[0] for word in words if word != '...']


def check_command(command: str) -> None:
    """Complain where a command could not be given: no such file, option, target or extra."""
    program, *rest = words_of(command)
    for word in rest:
        if re.fullmatch(rf'(?:{"|".join(FOLDERS)})/\S+', word):
            check_path(word)
    if program == 'python':
        check_script(rest)
    elif program == 'torchrun':
        start = next(number for number, word in enumerate(rest) if word.endswith('.py'))
        check_script(rest[start:])
    elif program == 'tools/dist_train.sh':
        config, processes, *options = rest
        assert processes.isdigit(), f'{command}: how many processes?'
        check_script(['tools/train.py', config, '--launcher', 'pytorch', *options])
    elif program == 'make':
        targets = re.findall(r'^([\w-]+):', (ROOT / 'Makefile').read_text(), re.MULTILINE)
        for word in rest:
            assert '=' in word or word in targets, f'{command}: no target {word} in the Makefile'
    elif program == 'pip':
        for extra in re.findall(r'mmprune\[(\w+)\]', command):
            project = (ROOT / 'pyproject.toml').read_text()
            assert re.search(rf'^{extra} = \[', project, re.MULTILINE), f'no extra {extra}'
    else:
        assert program in (*PROGRAMS, 'cd', 'export'), f'{command}: what is {program}?'


def check_path(path: str) -> None:
    """A file or folder of the repository, or a pattern that some match."""
    assert glob.glob(str(ROOT / path.partition('::')[0])), f'no {path}'


class _Parsed(BaseException):
    """A script's arguments were parsed, so it is left."""


def check_script(words: list[str]) -> None:
    """Give a script its arguments, and leave it when it has parsed them."""
    if words[0] == '-m':
        spec = find_spec(words[1])
        assert spec is not None and spec.origin, f'no module {words[1]}'
        script, arguments = spec.origin, words[2:]
        if not Path(script).is_relative_to(ROOT):
            return
    else:
        script, arguments = str(ROOT / words[0]), words[1:]
    assert Path(script).is_file(), f'no script {words[0]}'
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_leave(parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:  # CONFIG and CHECKPOINT are the reader's files
            patch.setattr(Path, 'is_file', lambda _: True)
            patch.setattr(Path, 'is_dir', lambda _: True)
            parse_args(parser, arguments)
        raise _Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, 'parse_args', parse_and_leave)
        patch.setattr(sys, 'argv', [script, *arguments])
        patch.setattr(sys, 'path', [str(Path(script).parent), *sys.path])
        try:
            runpy.run_path(script, run_name='__main__')
        except _Parsed:
            return
        except SystemExit as error:
            raise AssertionError(f'{" ".join(words)}: not what {words[0]} takes') from error
    raise AssertionError(f'{words[0]} parses no arguments')
