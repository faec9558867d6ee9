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
    rows, missing, failed = [], [], ''
    truth = told.get('truth') or {}
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
            try:
                of = told['scales'][file], each or NOTHING, told['meta'], truth.get(file)
                jpeg = pictures.drawn(jpeg, *of) if each or file in truth else jpeg
            except Exception as error:  # of a visualizer, whatever it lacks: the picture is left out
                failed = f'{type(error).__name__}: {error}'
                continue
            label, words = _in_words(each, told['meta'])
            strip.append(
                pages.Picture(f'{which}: {label}', address_of(jpeg), f'{which} network, {words}')
            )
        if strip:
            rows.append((file.rsplit('/', 1)[-1] + _annotated(truth.get(file)), strip))
    marks = (
        ' What is annotated is drawn in white: boxes dashed, keypoints as crosses.'
        if truth
        else ' What is annotated was not recorded.'
    )
    blocks: Blocks = [
        pages.Text(
            'Pictures of the validation set with what the unpruned network found at its last '
            'validation before the first cut, and the pruned one at its last. Scores above '
            f'{pictures.THRESHOLD} are drawn.{marks}'
        ),
        pages.Text(
            'Fewer boxes can mean a better AP. AP counts false and double boxes against a network, it '
            'also counts boxes with scores below those that are drawn, and it rewards boxes that fit '
            'tightly. Compare the boxes with the annotations rather than their numbers with each other.'
        ),
    ]
    if failed:
        blocks.append(pages.Notice(f'Some pictures could not be drawn: {failed}.', 'warning'))
    if rows:
        blocks.append(pages.Pictures(rows))
    if missing:
        names = ', '.join(f'`{name}`' for name in missing)
        blocks.append(pages.Notice(f'No copy of these pictures is in the work directory: {names}.'))
    return blocks


NOTHING: dict[str, Any] = {'boxes': [], 'labels': [], 'scores': []}


def _annotated(truth: dict[str, Any] | None) -> str:
    if truth is None:
        return ''
    return f': {len(truth["keypoints"] if "keypoints" in truth else truth["boxes"])} annotated'


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
