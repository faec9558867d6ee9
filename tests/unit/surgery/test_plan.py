import copy
import random
import time
import tracemalloc

import pytest
import torch
from torch import nn

import mmprune
from mmprune import Plan, PruneError
from mmprune.surgery.format import checksum
from tests.helpers.equality import assert_same


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 1, groups=2),
        nn.Conv2d(8, 4, 1),
    )


X = torch.randn(2, 3, 6, 6)


def forward(model):
    return model(X)


@pytest.fixture
def plan():
    return mmprune.prune(net(), forward, keep_channels=0.5)


def test_a_plan_says_what_is_kept_of_each_tensor(plan):
    assert plan.keep['0.weight'] == {0: plan.keep['0.bias'][0]}
    assert plan.keep['1.running_mean'] == plan.keep['0.bias']
    assert plan.attributes['1'] == {'num_features': 4}
    assert plan.removed('0.bias', 0) == [i for i in range(8) if i not in plan.keep['0.bias'][0]]
    assert plan.history[0]['params_before'] == sum(p.numel() for p in net().parameters())


def test_meta_is_plain_and_comes_back(plan):
    def plain(value):
        if isinstance(value, dict):
            return all(type(k) in (str, int) and plain(v) for k, v in value.items())
        if isinstance(value, list):
            return all(map(plain, value))
        return type(value) in (int, str, float, bool)

    assert plain(plan.to_meta())
    assert Plan.from_meta(plan.to_meta()) == plan


def test_two_cuts_are_one_plan():
    model = net()
    first = mmprune.prune(model, forward, keep_channels=0.75, divisor=1)
    both = mmprune.prune(model, forward, keep_channels=0.5, divisor=1)
    assert len(both.history) == 2
    assert set(both.keep['0.weight'][0]) < set(first.keep['0.weight'][0])
    fresh = net()
    both.apply(fresh)
    assert torch.equal(forward(model), forward(fresh))


def test_plans_that_do_not_follow_each_other(plan):
    with pytest.raises(
        PruneError, match=r'made for 0.weight of shape \(8, 3, 3, 3\), the first leaves'
    ):
        plan.then(plan)


def test_another_model_lists_its_differences(plan):
    other = net()
    other[0] = nn.Conv2d(3, 10, 3)
    with pytest.raises(
        PruneError, match=r'0.weight: the plan has \(8, 3, 3, 3\), the model \(10, 3, 3, 3\)'
    ):
        plan.apply(other)


def test_a_cut_model_is_another_model(plan):
    model = net()
    plan.apply(model)
    with pytest.raises(PruneError, match='made for another architecture'):
        plan.apply(model)


def test_a_later_format_says_which_mmprune_it_needs(plan):
    meta = plan.to_meta() | {'format': 7, 'mmprune': '3.1.4', 'keep': 'of another kind'}
    with pytest.raises(
        PruneError, match=r"format 7, this mmprune reads up to 1: .* mmprune '3.1.4'; install"
    ):
        Plan.from_meta(meta)


# -- damaged ------------------------------------------------------------------------------------------

DEEP: list = []
for _ in range(5000):
    DEEP = [DEEP]
ENDLESS: dict = {}
ENDLESS['x'] = ENDLESS
ODD = [
    None, True, False, 0, 1, -1, 5, 1 << 62, 1 << 80, 10**5000, -(10**5000), 0.5, float('nan'),
    float('inf'), '', 'x', 'a' * 10000, b'x', (), (1,), [], [[]], [0], [1 << 62], {}, {'x': 1},
    {0: [0]}, {1: {}}, DEEP, ENDLESS, torch.zeros(2), object(), int, [None], ['x'], {10**5000: 1},
    '__class__',
    'training', 'forward', torch.zeros(1).expand(10**9, 10**9),
]  # fmt: skip


def damaged(meta, chance):
    """One to three random changes somewhere in a deep copy."""
    meta = copy.deepcopy(meta)
    for _ in range(chance.choice([1, 1, 2, 3])):
        holder, depth = meta, 0
        while True:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            if not keys:
                break
            key = chance.choice(keys)
            inner = holder[key]
            if isinstance(inner, dict | list) and inner and chance.random() < 0.75 and depth < 4:
                holder, depth = inner, depth + 1
                continue
            change(holder, key, chance)
            break
    return meta


def change(holder, key, chance):
    value = holder[key]
    kind = chance.randrange(6)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, list):
        holder.insert(chance.randrange(len(holder) + 1), chance.choice([value, *ODD]))
    elif kind == 2 and isinstance(holder, dict):
        new = chance.choice([k for k in ODD if k.__hash__ is not None])
        holder[new] = holder.pop(key)
    elif kind == 3 and isinstance(value, int):
        holder[key] = value + chance.choice([-1, 1, 2, 100])
    elif kind == 4 and isinstance(value, list):
        chance.shuffle(value)
        value += value[:1]
    else:
        holder[key] = chance.choice(ODD)


def with_lists(value):
    """The same with lists for tuples: a tuple does for a list."""
    if isinstance(value, dict):
        return {key: with_lists(each) for key, each in value.items()}
    return [with_lists(each) for each in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize('signed', [False, True])
def test_damaged_meta_is_always_a_prune_error(plan, signed):
    """``signed``: with a checksum that fits, as a stranger can make it: then what is read must be a
    plan of the same shapes, or be refused when it is applied, and the model stays as it was."""
    good, chance = plan.to_meta(), random.Random(0)
    refused, start = 0, time.monotonic()
    for number in range(4000):
        meta = damaged(good, chance)
        if signed:
            try:
                meta['checksum'] = checksum(meta)
            except (TypeError, ValueError, KeyError, RecursionError):
                continue
        try:
            found = Plan.from_meta(meta)
        except PruneError as error:
            refused += 1
            assert len(str(error)) < 2000 or 'a' * 1000 in str(error), number
            continue
        if not signed:
            known = {part: meta[part] for part in good}
            assert_same(good, with_lists(known))  # or damage was not seen
            continue
        model = net()
        before = copy.deepcopy(model.state_dict())
        try:
            found.apply(model)
        except PruneError:
            assert_same(before, model.state_dict())
            assert mmprune.plan_of(model) is None
    assert refused > (3900 if not signed else 500)
    assert time.monotonic() - start < 60


@pytest.mark.parametrize(
    ('module', 'attribute', 'value'),
    [
        ('1', 'training', 1), ('1', 'forward', 1), ('1', 'eps', 1), ('1', 'affine', 1),
        ('', 'forward', 1),
        ('1', 'num_features', 99), ('0', '_parameters', 1), ('0', 'weight', 1), ('0', 'kernel_size', 1),
        ('0', 'kernel_size[7]', 1), ('0', 'stride[0]', 2), ('9', 'in_channels', 2), ('0', 'nothing', 1),
        ('0', 'forward.x', 1), ('0', 'padding_mode[0]', 1), ('0', 'kernel_size[0].real', 1),
    ],
)  # fmt: skip
def test_attributes_reach_nothing_but_widths_that_shrink(plan, module, attribute, value):
    meta = plan.to_meta() | {'attributes': {module: {attribute: value}}}
    meta['checksum'] = checksum(meta)
    model = net()
    with pytest.raises(PruneError, match='the plan sets it to'):
        Plan.from_meta(meta).apply(model)
    assert torch.equal(forward(model), forward(net()))


@pytest.mark.parametrize(
    'attribute',
    ['__class__', 'a.__dict__', 'a[0]x', 'a[-1]', '', 'a..b', 'a b', '[0]', 'a' * 999, 'a.b()'],
)
def test_names_that_are_no_attributes_are_refused(plan, attribute):
    meta = plan.to_meta() | {'attributes': {'0': {attribute: 1}}}
    meta['checksum'] = checksum(meta)
    with pytest.raises(PruneError, match='not a positive width'):
        Plan.from_meta(meta)


def test_huge_counts_take_no_memory(plan):
    meta = plan.to_meta()
    meta['fingerprint'] |= {f'x{i}': [1 << 60] * 50 for i in range(1000)}
    meta['checksum'] = checksum(meta)
    tracemalloc.start()
    with pytest.raises(PruneError, match='made for another architecture'):
        Plan.from_meta(meta).apply(net())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20e6, 'bytes'


@pytest.mark.parametrize('key', ['flops_before', 'flops', 'params_before', 'params'])
@pytest.mark.parametrize('value', [None, 'many', 1.5, -1, True])
def test_a_history_counts(plan, key, value):
    meta = plan.to_meta()
    meta['history'][-1][key] = value
    meta['checksum'] = checksum(meta)
    with pytest.raises(PruneError, match=f"'{key}'"):
        Plan.from_meta(meta)


def test_a_plan_brings_a_copy_that_was_cut_before_up_to_date():
    model = net()
    average = torch.optim.swa_utils.AveragedModel(model)
    for prune_num in (4, 2, 1):
        plan = mmprune.prune(model, forward, prune_num=prune_num, divisor=1)
        plan.apply(average)
        assert mmprune.plan_of(average) == plan == mmprune.plan_of(model)
        average.update_parameters(model)
        assert torch.equal(average.eval()(X), model.eval()(X))
    with pytest.raises(PruneError, match='made for another architecture'):
        plan.apply(model)  # nothing of it is left


def test_a_plan_of_other_cuts_does_not_follow():
    model, other = net(), net()
    plan = mmprune.prune(model, forward, prune_num=4, divisor=1)
    mmprune.prune(other, forward, prune_num=1, divisor=1, score=[1, 1, 1, 1, 1, 0, 1, 1])
    with pytest.raises(PruneError, match='made for another architecture'):
        plan.apply(other)
