"""Reasons why channels may not be removed: a kind of reason, with the place where it arose."""

import enum
from dataclasses import dataclass


class LockKind(enum.Enum):
    """The kinds of reasons. The value is the sentence of a report; a lock's ``detail`` may complete
    it."""

    # What the channels are
    OUTPUT = 'output of the model'
    LOSS_INPUT = 'input of a loss'
    UNREAD = 'read by no layer in the traced run'
    UNUSED = 'not used in the traced run'
    ONLY_CHANNEL = 'only channel left'
    INPUT_CHANNELS = 'input channels (image or constant)'
    KERNEL = 'kernel positions'  # these are no channels, so no report shows this reason
    POSITIONS = 'sampling positions'
    RANDOM = 'random numbers drawn for each channel'
    # What the channels are combined with
    FIXED_OPERAND = 'combined elementwise with a constant of fixed size'
    OTHER_SIZE = 'combined elementwise with a tensor of another size'
    FIXED_MATRIX = 'multiplied with a constant matrix of fixed size'
    FIXED_CHANNEL = 'tied to a channel that cannot be removed'
    FIXED_CHANNEL_READ = 'contracted with a channel that cannot be removed'
    ZERO_ON_NEITHER_SIDE = 'a product in which a removed channel would be zero on neither side'
    ZERO_MOVED = 'summed over channels where a removed one would not be zero'
    # What is computed along the channel dimension
    SPATIAL = 'spatial op along the channel dimension'
    REDUCED = 'mean / max / norm over the channel dimension'
    SEQUENTIAL = 'softmax / sort / cumulative op over the channel dimension'
    WHOLE = 'op over the whole tensor'
    NORMALIZED = 'normalized along the channel dimension'
    LAYER_NORM = 'layer norm statistics over the channel dimension'
    WEIGHT_NORM = 'weight norm over the channel dimension'
    STANDARDIZED = 'standardized weight: its statistics run over the channel dimension'
    ATTENTION = 'attention along the channel dimension'
    ATTENTION_SCALE = 'attention scale computed from the channel count'
    ATTENTION_MASK = 'attention mask'
    GROUPED_TRANSPOSED = 'channels of a grouped transposed convolution'
    # What selects or moves channels
    CONSTANT_INDEX = 'channels selected by a constant index'
    CONSTANT_SLICE = 'channels selected by a constant slice'
    SCATTERED = 'scattered along the channel dimension'
    USED_AS_INDEX = 'used as an index'
    FIXED_INDEX = 'gathered with an index of fixed size'
    CROPPED = 'channels cropped by a constant'
    ROLLED = 'rolled along the channel dimension'
    REPEATED = 'repeated as often as the data says'
    STRIDED = 'strided view'
    OTHER_DTYPE = 'viewed as another dtype'
    RESHAPED = 'reshaped across the boundaries of channels'
    JOINED = 'tied by the operation'
    MERGED = 'two channel dimensions merged into one'
    UNEQUAL_PARTS = 'split into unequal parts'
    EQUAL_PARTS = 'split into parts of one size'
    PARTIAL_WRITE = 'written into a part of another tensor'
    OTHER_VIEW = 'read through another view of the memory of'
    # How their number is used
    HARD_CODED = 'hard-coded size in view / split / expand'
    ARITHMETIC = 'channel count used in arithmetic'
    PASSED_AS_VALUE = 'channel count passed as a value to'
    COMPARED = 'channel count compared with a constant'
    FACTOR = 'channel count used as a factor of a size'
    UNTRACKED_SIZE = 'size of a dimension without channels'
    OTHER_TENSORS_SIZE = 'has the size of another tensor'
    SHARED_ATTRIBUTE = 'channel dimensions of different sizes share the attribute'
    NOT_A_MULTIPLE = 'not in whole proportion to the attribute'
    HARD_CODED_MODULE = 'sizes hard-coded by'
    # What the trace could not find out
    NO_RULE = 'no rule for this operation'
    UNKNOWN_FORM = 'form of the operation that its rule does not cover'
    PYTHON_VALUE = 'read as a Python value'
    LEAVES_TORCH = 'leaves torch by'
    STATED = ''  # ``detail`` is the whole sentence, of an adapter or of a saved trace


@dataclass(frozen=True)
class Lock:
    """The reason why some channels may not be removed.

    Args:
        kind: the kind of reason.
        op: the operation at which the reason arose; empty if there is none.
        module: the name and class of the module that ran, or the attribute that counts the channels.
        detail: text that completes the sentence of ``kind``.
    """

    kind: LockKind
    op: str = ''
    module: str = ''
    detail: str = ''

    @property
    def text(self) -> str:
        """The reason as a sentence, without the operation and the module."""
        return ' '.join(filter(None, (self.kind.value, self.detail)))

    def __str__(self) -> str:
        place = ' in '.join(filter(None, (self.op, self.module)))
        return f'{self.text}: {place}' if place else self.text


def stated(text: str) -> Lock:
    """Makes a lock whose whole reason is ``text``."""
    return Lock(LockKind.STATED, detail=text)
