"""A suggestion as text of a config: what stands there is what the hook gets."""

from mmengine.config import Config

from mmprune.mm.analysis.snippet import budget_in, hook_of, snippet

OPTIONS = {
    'keep_flops': 0.55,
    'lock': ['backbone.bn1.weight'],
    'parts': {'neck.conv.weight': {'min_channels': 12}},
}


def pasted(cfg, options=OPTIONS):
    return Config.fromstring(cfg.pretty_text + '\n' + snippet(cfg, options), '.py')


def test_into_a_config_without_hooks():
    cfg = pasted(Config(dict(a=1)))
    assert cfg.custom_imports == dict(imports=['mmprune'])
    assert cfg.custom_hooks == [dict(type='PruneHook', **OPTIONS)]
    assert cfg.a == 1


def test_other_hooks_and_what_the_own_one_has_beside_its_budget_stay():
    own = dict(
        type='PruneHook', score=dict(name='taylor', per='memory'), steps=7, end=0.3, keep_params=0.4,
        divisor=8, lock=('x',), parts=dict(neck=dict(keep_flops=0.8)),
    )  # fmt: skip
    before = Config(
        dict(
            custom_imports=dict(imports=['other'], allow_failed_imports=False),
            custom_hooks=[dict(type='EMAHook', momentum=1e-4), own, dict(type='SyncBuffersHook')],
        )
    )
    text = snippet(before, OPTIONS)
    cfg = Config.fromstring(text.replace("'other', ", ''), '.py')
    assert "imports=['other', 'mmprune']" in text
    assert [hook.type for hook in cfg.custom_hooks] == ['EMAHook', 'SyncBuffersHook', 'PruneHook']
    assert cfg.custom_hooks[0] == before.custom_hooks[0]
    score = dict(name='taylor', per='memory')
    kept = dict(type='PruneHook', score=score, steps=7, end=0.3, divisor=8)
    assert cfg.custom_hooks[2] == {**kept, **OPTIONS}


def test_long_options_take_a_line_each():
    options = {'keep_flops': 0.5, 'lock': [f'backbone.layer{n}.bn1.weight' for n in range(9)]}
    text = snippet(Config(dict()), options)
    assert max(map(len, text.splitlines())) < 90
    assert pasted(Config(dict()), options).custom_hooks[0].lock == options['lock']


def test_the_budget_of_a_hook_is_in_its_options_or_one_of_them():
    hooks = [dict(type='PruneHook', keep_flops=0.5, steps=3)]
    assert budget_in(hook_of(Config(dict(custom_hooks=hooks)))) == {'keep_flops': 0.5}
    hooks = [dict(type='PruneHook', budget=dict(latency=0.5, lock=['a']))]
    assert budget_in(hook_of(Config(dict(custom_hooks=hooks)))) == {'latency': 0.5, 'lock': ['a']}
    hooks = [dict(type='PruneHook', rebuild_only=True), dict(type='EMAHook')]
    assert hook_of(Config(dict(custom_hooks=hooks))) == {}
