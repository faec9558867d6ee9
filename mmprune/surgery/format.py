"""Format 1 of ``meta['mmprune']``, the record of a plan in a checkpoint, and its validation.

A checkpoint may come from a stranger, so every part is checked before it is used. For example, an entry
``attributes = {'0': {'__class__': 1}}`` is refused, because only positive widths can be set.
"""

import hashlib
import json
import re
import reprlib
from typing import Any

from mmprune.errors import PruneError

FORMAT = 1
"""Version of ``meta['mmprune']`` that this mmprune writes. Records of later versions are refused."""

_PARTS: dict[str, type] = dict(
    format=int, mmprune=str, fingerprint=dict, keep=dict, attributes=dict, history=list, budget=dict
)
"""{part of a record: its type}; every record has these parts."""

_ATTRIBUTE = re.compile(r'[A-Za-z_]\w*(\.[A-Za-z_]\w*|\[\d+\])*')
"""The form of an attribute that a plan may set: names, with dots and indices of lists."""


def checksum(meta: dict[str, Any]) -> str:
    """Computes the SHA-256 of all parts of a record except the checksum itself."""
    parts = {part: meta[part] for part in (*_PARTS, 'aliases') if part in meta}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def check_meta(meta: Any) -> None:
    """Checks every part of a record that :meth:`mmprune.Plan.to_meta` wrote.

    Raises:
        PruneError: the record is corrupt, of a later format, or no plan. The message names the part.
    """
    _expect(isinstance(meta, dict), '', meta, 'a dict')
    version = meta.get('format')
    if isinstance(version, int) and version > FORMAT:
        raise PruneError(
            f"meta['mmprune'] has format {_short(version)}, this mmprune reads up to {FORMAT}: it was "
            f'written by mmprune {_short(meta.get("mmprune"))}; install that version or a later one'
        )
    for part, expected_type in _PARTS.items():
        value = meta.get(part)
        right = isinstance(value, expected_type) and not isinstance(value, bool)
        _expect(right, f'[{part!r}]', value, f'of type {expected_type.__name__}')
    _expect(meta['format'] == FORMAT, "['format']", meta['format'], str(FORMAT))
    for name, shape in meta['fingerprint'].items():
        right = isinstance(name, str) and isinstance(shape, list)
        right = right and all(_is_int(size) and size >= 0 for size in shape)
        _expect(right, f"['fingerprint'][{_short(name)}]", shape, 'a shape')
    _check_keep(meta['keep'], meta['fingerprint'])
    _check_aliases(meta)
    for name, values in meta['attributes'].items():
        right = isinstance(name, str) and isinstance(values, dict)
        _expect(right, f"['attributes'][{_short(name)}]", values, 'a dict of a module')
        for attribute, value in values.items():
            right = isinstance(attribute, str) and len(attribute) < 200 and '__' not in attribute
            right = right and bool(_ATTRIBUTE.fullmatch(attribute)) and _is_int(value) and value > 0
            where = f"['attributes'][{_short(name)}][{_short(attribute)}]"
            _expect(right, where, value, 'a positive width')
    for index, entry in enumerate(meta['history']):
        _check_record(entry, f"['history'][{index}]")
    _expect(_is_plain(meta['budget']), "['budget']", meta['budget'], 'a dict of plain values')
    stored = meta.get('checksum')
    _expect(stored == checksum(meta), "['checksum']", stored, 'the checksum of the other parts')


def _check_keep(keep: dict[Any, Any], fingerprint: dict[str, list[int]]) -> None:
    for name, dims in keep.items():
        shape = fingerprint.get(name, [])
        where = f"['keep'][{_short(name)}]"
        right = name in fingerprint and isinstance(dims, dict)
        _expect(right, where, dims, 'a dict of a tensor in the fingerprint')
        for dim, kept in dims.items():
            where_dim = f'{where}[{_short(dim)}]'
            right = _is_int(dim) and 0 <= dim < len(shape)
            _expect(right, where_dim, kept, f'for a dimension below {len(shape)}')
            right = isinstance(kept, list) and 0 < len(kept) <= shape[dim] and all(map(_is_int, kept))
            _expect(right, where_dim, kept, f'a list of 1 to {shape[dim]} indices')
            right = kept[0] >= 0 and kept[-1] < shape[dim]
            right = right and all(a < b for a, b in zip(kept, kept[1:], strict=False))
            _expect(right, where_dim, kept, f'ascending indices from 0 to {shape[dim] - 1}')


def _check_aliases(meta: dict[str, Any]) -> None:
    aliases, shapes, keep = meta.get('aliases', {}), meta['fingerprint'], meta['keep']
    _expect(isinstance(aliases, dict), "['aliases']", aliases, 'of type dict')
    for name, first_name in aliases.items():
        right = isinstance(first_name, str) and name in shapes and first_name not in aliases
        right = (
            right and shapes[name] == shapes.get(first_name) and keep.get(name) == keep.get(first_name)
        )
        _expect(right, f"['aliases'][{_short(name)}]", first_name, 'another name of the same tensor')


def _check_record(entry: Any, where: str) -> None:
    _expect(isinstance(entry, dict) and _is_plain(entry), where, entry, 'a dict of plain values')
    for key in ('flops_before', 'flops', 'params_before', 'params'):
        value: Any = entry.get(key)
        right = _is_int(value) and value >= key.endswith('_before')
        _expect(right, f'{where}[{key!r}]', value, 'a count')
    for key in {'iteration', 'units_removed'} & entry.keys():
        _expect(_is_int(entry[key]), f'{where}[{key!r}]', entry[key], 'an integer')
    latency, uneven = entry.get('latency', 1.0), entry.get('uneven', [])
    right = isinstance(latency, float) or _is_int(latency)
    _expect(right, f"{where}['latency']", latency, 'a number')
    right = isinstance(uneven, list) and all(isinstance(sentence, str) for sentence in uneven)
    _expect(right, f"{where}['uneven']", uneven, 'a list of strings')


def _expect(right: bool, where: str, value: Any, wanted: str) -> None:
    """Raises the error of a corrupt record unless ``right``."""
    if not right:
        raise PruneError(
            f"meta['mmprune']{where} is {_short(value)}, not {wanted}: the file is truncated or "
            'corrupt, or was not written by mmprune; use another checkpoint'
        )


def _short(value: Any) -> str:
    """Shows at most 80 characters of a value that may be very long."""
    try:
        text = reprlib.repr(value)
    except ValueError:  # Python refuses to print integers of more than 4300 digits
        return f'something huge ({type(value).__name__})'
    return text if len(text) <= 80 else text[:77] + '...'


def _is_int(value: Any) -> bool:
    """Whether ``value`` is an integer of at most 64 bits, as torch and numpy can hold it."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63


def _is_plain(value: Any, depth: int = 6) -> bool:
    """Whether ``value`` consists of numbers, strings, lists and dicts, nested at most ``depth``
    levels."""
    if value is None or isinstance(value, bool | str | float) or _is_int(value):
        return True
    if depth == 0 or not isinstance(value, dict | list | tuple):
        return False
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item, depth - 1) for key, item in value.items())
    return all(_is_plain(item, depth - 1) for item in value)
