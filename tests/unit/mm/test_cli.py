import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mmengine.config import Config

from mmprune import PruneError
from mmprune.mm import cli

TOOLS = Path(__file__).parents[3] / 'tools'


def script(name):
    """The module of tools/NAME.py."""
    spec = importlib.util.spec_from_file_location(f'mmprune_tools_{name}', TOOLS / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def config(tmp_path):
    path = tmp_path / 'tiny.py'
    path.write_text("model = dict(type='A', depth=18)\nauto_scale_lr = dict(enable=False)\n")
    return str(path)


@pytest.fixture
def parse(monkeypatch):
    """Parse a command line such as 'train CONFIG --amp' with the script that it names."""

    # Setting it first makes pytest put its old state back, whatever the scripts do to it.
    monkeypatch.setenv('LOCAL_RANK', '')
    monkeypatch.delenv('LOCAL_RANK')

    def parse(name, *arguments):
        monkeypatch.setattr(sys, 'argv', [f'{name}.py', *arguments])
        return script(name).parse_args()

    return parse


@pytest.mark.parametrize(
    ('name', 'arguments', 'text'),
    [
        ('train', [], 'arguments are required: config'),
        ('train', ['no/such.py'], 'argument config: no/such.py does not exist'),
        ('train', ['FOLDER'], 'is a folder, not a file'),
        ('train', ['CONFIG', '--resume', 'no.pth'], 'argument --resume: no.pth does not exist'),
        ('train', ['CONFIG', '--cfg-options', 'a=1', 'b'], "expected key=value, got 'b'"),
        ('train', ['CONFIG', '--launcher', 'ssh'], "invalid choice: 'ssh'"),
        ('test', ['CONFIG'], 'arguments are required: checkpoint'),
        ('test', ['CONFIG', 'no.pth'], 'argument checkpoint: no.pth does not exist'),
        ('test', ['CONFIG', 'CONFIG', '--out', 'x.json'], 'x.json must end in .pkl or .pickle'),
    ],
)
def test_bad_arguments_are_argparse_errors(parse, config, tmp_path, capsys, name, arguments, text):
    names = {'CONFIG': config, 'FOLDER': str(tmp_path)}

    with pytest.raises(SystemExit) as stopped:
        parse(name, *(names.get(argument, argument) for argument in arguments))

    assert stopped.value.code == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ('arguments', 'resume'),
    [
        ([], None),
        (['--resume'], 'auto'),
        (['--resume', 'auto'], 'auto'),
        (['--resume', 'CK'], 'CK'),
    ],
)
def test_resume(parse, config, arguments, resume):
    arguments = [config if argument == 'CK' else argument for argument in arguments]

    args = parse('train', config, *arguments)

    assert args.resume == (config if resume == 'CK' else resume)


def test_a_checkpoint_may_be_an_address(parse, config):
    assert parse('test', config, 'https://host/x.pth').checkpoint == 'https://host/x.pth'


def test_options_are_put_over_the_config(parse, config):
    args = parse('train', config, '--launcher', 'slurm', '--cfg-options', 'model.depth=50', 'a=[1,2]')

    cfg = cli.load_config(args)

    assert cfg.model == dict(type='A', depth=50)
    assert cfg.a == [1, 2]
    assert cfg.launcher == 'slurm'


@pytest.mark.parametrize(
    ('arguments', 'work_dir'),
    [
        ([], 'work_dirs/tiny'),
        (['--cfg-options', 'work_dir=theirs'], 'theirs'),
        (['--cfg-options', 'work_dir=theirs', '--work-dir', 'mine'], 'mine'),
    ],
)
def test_work_dir(parse, config, arguments, work_dir):
    assert cli.load_config(parse('train', config, *arguments)).work_dir == work_dir


@pytest.mark.parametrize('name', ['train', 'test'])
def test_a_work_dir_that_can_not_be_made_is_named(parse, config, tmp_path, name):
    more = [config] if name == 'test' else []
    args = parse(name, config, *more, '--work-dir', f'{config}/mine')
    with pytest.raises(
        PruneError, match=r'--work-dir .*tiny.py/mine: .*tiny.py is a file, not a folder'
    ):
        cli.load_config(args)
    args = parse(name, config, *more, '--work-dir', config)
    with pytest.raises(PruneError, match=r'--work-dir .*tiny.py: .*tiny.py is a file, not a folder'):
        cli.load_config(args)


@pytest.mark.parametrize(
    'option, told',
    [
        (
            'hooks.2.steps=3',
            "hooks.2.steps=3: hooks is a list of 1 and has no entry '2'; its entries are hooks.0",
        ),
        ('hooks.first.steps=3', "hooks is a list of 1 and has no entry 'first'"),
        ('none.0=3', "none is a list of 0 and has no entry '0'; its entries are none"),
        (
            'model.depth.x=3',
            "model.depth.x=3: model.depth is 18 and has no 'x'; set model.depth itself",
        ),
    ],
)
def test_an_option_without_a_place_is_named(parse, config, option, told):
    with open(config, 'a') as file:
        file.write("hooks = [dict(type='B')]\nnone = []\n")
    with pytest.raises(PruneError, match=f'--cfg-options: .*{re.escape(told)}'):
        cli.load_config(parse('train', config, '--cfg-options', option))


def test_local_rank_does_not_replace_the_launchers(parse, config):
    cli.load_config(parse('train', config, '--local_rank', '3'))
    assert os.environ['LOCAL_RANK'] == '3'

    cli.load_config(parse('train', config, '--local-rank', '1'))
    assert os.environ['LOCAL_RANK'] == '3'


def test_mixed_precision(monkeypatch):
    train = script('train')
    monkeypatch.setattr(train, 'is_cuda_available', lambda: True)  # as on a machine with a card
    cfg = Config(dict(optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='SGD'))))

    train.use_mixed_precision(cfg)

    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    assert cfg.optim_wrapper.loss_scale == 'dynamic'
    cfg.optim_wrapper.type = 'ApexOptimWrapper'
    with pytest.raises(PruneError, match='optim_wrapper.type=ApexOptimWrapper'):
        train.use_mixed_precision(cfg)


def test_mixed_precision_on_a_cpu_is_bfloat16(monkeypatch):
    train = script('train')
    for name in ('cuda', 'npu', 'mlu', 'musa'):
        monkeypatch.setattr(train, f'is_{name}_available', lambda: False)
    cfg = Config(dict(optim_wrapper=dict(type='AmpOptimWrapper', loss_scale='dynamic')))

    train.use_mixed_precision(cfg)

    assert cfg.optim_wrapper == dict(type='CPUAmpOptimWrapper')
    cfg.optim_wrapper = dict(type='OptimWrapper', dtype='float16')
    with pytest.raises(PruneError, match='--amp: optim_wrapper.dtype=float16'):
        train.use_mixed_precision(cfg)


def test_learning_rate_is_scaled_from_a_known_batch_size():
    cfg = Config(dict(auto_scale_lr=dict(base_batch_size=16)))

    script('train').scale_learning_rate(cfg)

    assert cfg.auto_scale_lr.enable
    with pytest.raises(PruneError, match='no auto_scale_lr.base_batch_size'):
        script('train').scale_learning_rate(Config(dict(auto_scale_lr=dict(enable=False))))


@pytest.mark.parametrize(
    ('scope', 'switch', 'folder'),
    [('mmdet', 'draw', 'test_out_dir'), ('mmpose', 'enable', 'out_dir')],
)
def test_showing_predictions(parse, config, scope, switch, folder):
    args = parse('test', config, config, '--show-dir', 'painted')
    cfg = Config(dict(default_scope=scope, default_hooks=dict(visualization=dict(type='V'))))

    script('test').show_predictions(cfg, args)

    hook = dict(type='V', show=False, wait_time=2.0) | {switch: True, folder: 'painted'}
    assert cfg.default_hooks.visualization == hook
    with pytest.raises(PruneError, match='no default_hooks.visualization'):
        script('test').show_predictions(Config(dict(default_hooks=dict())), args)


def detector():
    """A config of mmdet whose data set is wrapped in another."""
    inner = dict(type='CocoDataset', pipeline=[dict(type='Load'), dict(type='Pack', a=1)])
    loader = dict(dataset=dict(type='RepeatDataset', dataset=inner))
    return Config(dict(default_scope='mmdet', model=dict(type='A'), test_dataloader=loader))


def test_test_time_augmentation_of_a_detector_flips_by_default():
    cfg = detector()

    script('test').augment(cfg)

    assert cfg.model.type == 'DetTTAModel'
    assert cfg.model.module == dict(type='A')
    load, augment = cfg.test_dataloader.dataset.dataset.pipeline
    flips, (pack,) = augment.transforms
    assert load.type == 'Load'
    assert [flip.prob for flip in flips] == [1, 0]
    assert pack.a == 1
    assert {'flip', 'flip_direction'} <= set(pack.meta_keys)


def test_test_time_augmentation_of_the_config_is_taken():
    cfg = detector()
    cfg.tta_model = dict(type='Mine')
    cfg.tta_pipeline = [dict(type='Other')]

    script('test').augment(cfg)

    assert cfg.model == dict(type='Mine', module=dict(type='A'))
    assert cfg.test_dataloader.dataset.dataset.pipeline == [dict(type='Other')]


def test_test_time_augmentation_of_a_pose_model_must_be_in_its_config():
    cfg = detector()
    cfg.default_scope = 'mmpose'

    with pytest.raises(PruneError, match='no tta_model or no tta_pipeline'):
        script('test').augment(cfg)


def test_a_prune_error_is_one_line_and_exit_code_1(monkeypatch, capsys):
    def main():
        raise PruneError('keep_flops=1.3 is outside (0, 1]')

    monkeypatch.setattr(sys, 'argv', ['tools/train.py'])
    with pytest.raises(SystemExit) as stopped:
        cli.run(main)
    assert stopped.value.code == 'train.py: error: keep_flops=1.3 is outside (0, 1]'


def test_other_errors_keep_their_traceback():
    def main():
        raise ValueError('a bug')

    with pytest.raises(ValueError, match='a bug'):
        cli.run(main)


@pytest.mark.parametrize('name', ['train', 'test'])
def test_the_scripts_run_from_anywhere(tmp_path, name):
    done = subprocess.run(
        [sys.executable, TOOLS / f'{name}.py', 'missing.py', 'missing.pth'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )

    assert done.returncode == 2, done.stderr
    assert done.stderr.endswith(f'{name}.py: error: argument config: missing.py does not exist\n')
