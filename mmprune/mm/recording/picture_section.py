"""The section that shows what both networks find in the same pictures."""

from typing import Any

from mmprune.mm import pages
from mmprune.mm.pages.page import Block
from mmprune.mm.recording import pictures, record
from mmprune.mm.recording.reading import Run, address_of

Blocks = list[Block]


def found(run: Run) -> Blocks:
    told = run.content.get('pictures') or {}
    both = told.get('found', {})
    if not both:
        return [
            pages.Notice(
                'No pictures: there was no validation, or the data set or the predictions are of a '
                'kind that is not drawn here (boxes and 2D keypoints are).'
            )
        ]
    rows, missing = [], []
    for number, file in enumerate(told['files']):
        if not any(file in both.get(which, {}) for which in both):
            continue
        copy = run.folder / record.FOLDER / f'{number}.jpg'
        if not copy.is_file() or file not in told['scales']:
            missing.append(file)
            continue
        strip = []
        for which in ('unpruned', 'pruned'):
            if which not in both:
                continue
            each = both[which].get(file)
            jpeg = copy.read_bytes()
            if each is not None:
                jpeg = pictures.drawn(jpeg, told['scales'][file], each, told['meta'])
            label, words = _in_words(each, told['meta'])
            strip.append(
                pages.Picture(f'{which}: {label}', address_of(jpeg), f'{which} network, {words}')
            )
        rows.append((file.rsplit('/', 1)[-1], strip))
    blocks: Blocks = [
        pages.Text(
            'Pictures of the validation set with what the unpruned network found at its last '
            'validation before the first cut, and the pruned one at its last. Scores above '
            f'{pictures.THRESHOLD} are drawn.'
        )
    ]
    if rows:
        blocks.append(pages.Pictures(rows))
    if missing:
        names = ', '.join(f'`{name}`' for name in missing)
        blocks.append(pages.Notice(f'No copy of these pictures is in the work directory: {names}.'))
    return blocks


def _in_words(each: Any, meta: dict[str, Any]) -> tuple[str, str]:
    """(A few words, a sentence) of what was found."""
    if not each:
        return 'nothing', 'which found nothing'
    if 'keypoints' in each:
        seen = sum(s > pictures.THRESHOLD for scores in each['keypoint_scores'] for s in scores)
        told = f'{len(each["keypoints"])} instances, {seen} keypoints'
        return told, f'which found {told}'
    classes = meta.get('classes') or []
    named = [
        f'{classes[label] if label < len(classes) else label} {score:.2f}'
        for label, score in zip(each['labels'], each['scores'], strict=True)
    ]
    return (
        f'{len(named)} found',
        f'which found {", ".join(named[:20])}' if named else 'which found nothing',
    )
