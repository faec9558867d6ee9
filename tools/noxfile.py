"""The versions that mmprune is tried with, each in an environment of its own.

    pip install nox
    nox -f tools/noxfile.py -l                 # lists the sessions
    nox -f tools/noxfile.py -s core            # the core, on every torch: minutes each
    nox -f tools/noxfile.py -s "stack(torch21)"  # OpenMMLab: compiles mmcv once, keeps the wheel
    nox -f tools/noxfile.py -s table           # writes docs/support.md from the sessions that ran

Every session builds the wheel, installs it with pip as a user does, and runs the tests outside of the
checkout, so that a file which is missing from the wheel is found. Results are kept in ``.nox/results``.
"""

import json
import platform
import re
import shutil
import time
from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / '.nox'
RESULTS = KEPT / 'results'

nox.options.envdir = str(KEPT / 'envs')
nox.options.sessions = ['core']
nox.options.reuse_existing_virtualenvs = True

CORE = {
    'floor': ('3.10', '2.1.2', 'numpy<2'),
    'torch24': ('3.11', '2.4.1', 'numpy<2'),
    'pins': ('3.11', '2.13.0', 'numpy<2'),
    'newest': ('3.13', None, 'numpy>=2'),
}
"""Python, torch (``None``: the newest that pip finds) and numpy of each session of the core."""

TESTED = [
    'pytest==9.2.0',
    'pytest-timeout==2.4.0',
    'pytest-xdist==3.8.0',
    'einops',
    'scikit-learn',
    'requests',
]

OLD_STACK = ['matplotlib==3.8.4', 'scikit-image==0.22.0', 'scikit-learn==1.4.2', 'scipy==1.12.0']
"""The last versions of what mmdet and mmpose need that work with the numpy of torch 2.1's time."""

STACKS = {
    'torch21': dict(python='3.11', torch='2.1.2', torchvision='0.16.2', instead=OLD_STACK),
    'pins': dict(python='3.11', torch='2.13.0', torchvision='0.28.0', instead=[]),
    'mmdet32': dict(
        python='3.11', torch='2.1.2', torchvision='0.16.2', instead=[*OLD_STACK, 'mmdet==3.2.0']
    ),
    'mmdet31': dict(
        python='3.11',
        torch='2.1.2',
        torchvision='0.16.2',
        instead=[*OLD_STACK, 'mmdet==3.1.0', 'mmcv==2.0.1'],
    ),
}
"""OpenMMLab's stack on several versions of torch. ``instead`` replaces packages of requirements.txt."""

FORKS = ['onedl-mmengine', 'onedl-mmcv', 'onedl-mmdetection']
"""The maintained forks, which have the import names of the originals."""


@nox.session(python=False)
@nox.parametrize('name', list(CORE), ids=list(CORE))
def core(session: nox.Session, name: str) -> None:
    """The tests of the core, and the quick example, with torch alone."""
    python, torch, numpy = CORE[name]
    run = environment(session, f'core-{name}', python)
    run(
        'pip', 'install', '-q', f'torch=={torch}' if torch else 'torch', numpy, 'setuptools<81', 'wheel'
    )
    run('pip', 'install', '-q', *TESTED)
    run('pip', 'install', '-q', wheel_of_project(session))
    with outcome(session, f'core-{name}', run):
        tests = copied_tests(session)
        run(
            'python',
            '-m',
            'pytest',
            '-n',
            '2',
            '-q',
            '-m',
            'not slow',
            'tests/unit',
            '--ignore=tests/unit/mm',
            '--ignore=tests/unit/graph/adapters',
            cwd=tests,
        )
        run('python', 'examples/quick.py', '--out', 'quick.pt2', cwd=tests)


@nox.session(python=False)
@nox.parametrize('name', list(STACKS), ids=list(STACKS))
def stack(session: nox.Session, name: str) -> None:
    """Training, testing, resuming and the suite with OpenMMLab's packages."""
    versions = STACKS[name]
    run = environment(session, f'stack-{name}', versions['python'])
    pins = pinned(versions['instead'])
    run(
        'pip',
        'install',
        '-q',
        f'torch=={versions["torch"]}',
        pins.pop('numpy'),
        'setuptools<81',
        'wheel',
        'ninja',
    )
    run('pip', 'install', '-q', '--no-deps', mmcv_wheel(run, pins.pop('mmcv'), versions))
    run('pip', 'install', '-q', '--no-deps', f'torchvision=={versions["torchvision"]}', *pins.values())
    run('pip', 'install', '-q', wheel_of_project(session))
    with outcome(session, f'stack-{name}', run):
        jobs(session, run, keypoints=True)
        run('python', '-m', 'pytest', '-n', '2', '-q', cwd=copied_tests(session))


@nox.session(python=False)
def forks(session: nox.Session) -> None:
    """Training, testing and resuming with the maintained forks of OpenMMLab and numpy 2."""
    run = environment(session, 'stack-forks', '3.11')
    run('pip', 'install', '-q', 'torch==2.9.1', 'torchvision==0.24.1', 'numpy>=2', 'setuptools<81')
    run('pip', 'install', '-q', *FORKS, *TESTED)
    run('pip', 'install', '-q', wheel_of_project(session))
    with outcome(session, 'stack-forks', run):
        jobs(session, run, keypoints=False)


@nox.session(python=False)
def table(session: nox.Session) -> None:
    """Writes docs/support.md from the results that are there."""
    rows = [json.loads(path.read_text()) for path in sorted(RESULTS.glob('*.json'))]
    if not rows:
        session.error('no session has run: start with nox -f tools/noxfile.py -s core')
    (ROOT / 'docs/support.md').write_text(page(rows), encoding='utf-8')


def environment(session: nox.Session, name: str, python: str):
    """Makes a virtual environment and returns a function that runs its programs."""
    folder = Path(nox.options.envdir) / name
    if not (folder / 'bin/python').exists():
        interpreter = shutil.which(f'python{python}')
        if interpreter is None:
            session.skip(f'python{python} is not on the PATH')
        session.run(interpreter, '-m', 'venv', str(folder), external=True)

    def run(program: str, *arguments: str, cwd: Path | None = None, silent: bool = False) -> str:
        with session.chdir(cwd or ROOT):
            return session.run(
                str(folder / 'bin' / program),
                *arguments,
                external=True,
                silent=silent,
                env={'OMP_NUM_THREADS': '1', 'PYTHONPATH': ''},
            )

    return run


def wheel_of_project(session: nox.Session) -> str:
    folder = Path(session.create_tmp()) / 'dist'
    session.run(
        'python', '-m', 'pip', 'wheel', '-q', '--no-deps', '-w', str(folder), str(ROOT), external=True
    )
    return str(next(folder.glob('mmprune-*.whl')))


def copied_tests(session: nox.Session) -> Path:
    """Copies what the tests need beside the package, so that they import the installed wheel."""
    folder = Path(session.create_tmp()) / 'tree'
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in ('tests', 'tools', 'configs', 'examples', 'docs', 'benchmarks'):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('pyproject.toml', 'README.md', 'CHANGELOG.md', 'requirements.txt', 'Makefile'):
        shutil.copy(ROOT / name, folder)
    return folder


def pinned(instead: list[str]) -> dict[str, str]:
    """Returns {package: requirement} of requirements.txt without torch, and with replacements."""
    lines = [
        line.split('#')[0].strip() for line in (ROOT / 'requirements.txt').read_text().splitlines()
    ]
    pins = {re.split('[=<>]', line)[0].lower(): line for line in lines if line}
    pins |= {re.split('[=<>]', line)[0].lower(): line for line in instead}
    left_out = {
        'torch',
        'torchvision',
        'setuptools',
        'wheel',
        'ninja',
        'sympy',
        'networkx',
        'fsspec',
        'jinja2',
        'markupsafe',
        'mpmath',
        'filelock',
        'typing_extensions',
    }
    return {name: line for name, line in pins.items() if name not in left_out}


def mmcv_wheel(run, requirement: str, versions: dict) -> str:
    """Compiles mmcv for this torch and keeps the wheel. Its name does not say for which torch it is, so
    pip's own cache cannot be used."""
    folder = KEPT / 'wheels' / f'torch{versions["torch"]}-python{versions["python"]}-{requirement}'
    if not list(folder.glob('mmcv-*.whl')):
        run(
            'pip',
            'wheel',
            '--no-cache-dir',
            '--no-deps',
            '--no-build-isolation',
            '-w',
            str(folder),
            requirement,
        )
    return str(next(folder.glob('mmcv-*.whl')))


def jobs(session: nox.Session, run, keypoints: bool) -> None:
    """Trains and prunes the embedded detector, tests it, and resumes it; the same for key points."""
    tree, work = copied_tests(session), Path(session.create_tmp()) / 'work'
    shutil.rmtree(work, ignore_errors=True)
    config = 'configs/faster_rcnn_prune.py'
    run('python', '-m', 'mmprune.mm.demo.shapes', 'data/shapes', cwd=tree)
    run('python', 'tools/train.py', config, '--work-dir', str(work / 'detector'), cwd=tree)
    newest = Path((work / 'detector/last_checkpoint').read_text().strip())
    run('python', 'tools/test.py', config, str(newest), cwd=tree)
    earlier = sorted((work / 'detector').glob('epoch_*.pth'))[0]
    run(
        'python',
        'tools/train.py',
        config,
        '--work-dir',
        str(work / 'resumed'),
        '--resume',
        str(earlier),
        cwd=tree,
    )
    if keypoints:
        config = 'configs/keypoint/simple_baseline_prune.py'
        run('python', 'tools/train.py', config, '--work-dir', str(work / 'keypoints'), cwd=tree)


class outcome:
    """Keeps what a session came to, with the versions that it had, also if it fails."""

    def __init__(self, session: nox.Session, name: str, run) -> None:
        self.name, self.run = name, run

    def __enter__(self) -> None:
        self.start = time.time()

    def __exit__(self, kind, error, trace) -> None:
        names = ('torch', 'numpy', 'mmengine', 'mmcv', 'mmdet', 'mmpose', *FORKS)
        versions = {
            line.split('==')[0].lower(): line.split('==')[1]
            for line in self.run('pip', 'freeze', silent=True).splitlines()
            if '==' in line and line.split('==')[0].lower() in names
        }
        python = self.run(
            'python', '-c', 'import platform; print(platform.python_version())', silent=True
        ).strip()
        RESULTS.mkdir(parents=True, exist_ok=True)
        result = dict(
            name=self.name,
            passed=kind is None,
            python=python,
            versions=versions,
            minutes=round((time.time() - self.start) / 60, 1),
            date=time.strftime('%Y-%m-%d'),
            system=f'{platform.system()} {platform.machine()}',
        )
        (RESULTS / f'{self.name}.json').write_text(json.dumps(result, indent=1) + '\n')


def page(rows: list[dict]) -> str:
    """Returns the text of docs/support.md."""
    lines = [
        '# What mmprune runs on',
        '',
        'For those who want to know whether mmprune fits into their environment. Each row is one',
        'session of `nox -f tools/noxfile.py`: the wheel was installed with pip, and tests and jobs',
        'ran outside of the checkout.',
        '',
        '| session | Python | torch | numpy | OpenMMLab | result | date |',
        '|---|---|---|---|---|---|---|',
    ]
    for row in rows:
        versions = dict(row['versions'])
        torch, numpy = versions.pop('torch', ''), versions.pop('numpy', '')
        others = ', '.join(f'{name} {version}' for name, version in versions.items()) or 'none'
        result = 'passed' if row['passed'] else 'failed'
        lines.append(
            f'| {row["name"]} | {row["python"]} | {torch} | {numpy} | {others} | {result} | '
            f'{row["date"]} |'
        )
    return '\n'.join(lines) + '\n'
