"""Writes a checkpoint's model as one ONNX file.

The model is built, wrapped in a network with post-processing, and traced. The file is written under a
temporary name, checked, and then renamed.
"""

import io
import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mmprune
from mmprune.copies import copied
from mmprune.errors import PruneError
from mmprune.mm.atomic_files import replace_file, sync_folder
from mmprune.mm.checkpoint import load_pruned, read_checkpoint, without_pretrained
from mmprune.mm.configs import image_size
from mmprune.mm.deploy import check as checks
from mmprune.mm.deploy.one_stage import one_stage_network
from mmprune.mm.deploy.onnx_file import BACKENDS, METADATA
from mmprune.mm.deploy.pipeline import describe, normalization_of
from mmprune.mm.deploy.pose_and_classifiers import classifier_network, keypoint_names, pose_network
from mmprune.mm.deploy.raw import RawNetwork
from mmprune.mm.deploy.tracing import to_onnx
from mmprune.mm.deploy.two_stage import two_stage_network
from mmprune.mm.models.classifier import ImageClassifier
from mmprune.onnx_sessions import load_package
from mmprune.surgery.build import remaining
from mmprune.surgery.meta import META, load_weights, plan_in, weights_in
from mmprune.surgery.plan import plan_of

OPSET = 18
"""The version of ONNX's operators that a file uses unless another one is requested."""

STRIDE = 32
"""Open sides are multiples of this number, so that the maps of neighbouring levels, which pyramids add,
have fitting sizes."""

KINDS = (
    'one-stage detectors with a dense head (RetinaNet, ATSS, FCOS, GFL, RTMDet, YOLOX, SSD and others '
    "that inherit mmdet's decoding)",
    'two-stage detectors (Faster R-CNN, R-FCN, Cascade R-CNN, Mask R-CNN, Sparse R-CNN, QueryInst)',
    'DETR',
    'top-down pose estimators with heatmaps or SimCC',
    'classifiers (ImageClassifier)',
)
"""The kinds of models that can be exported with post-processing, for the error about other kinds."""


def export(
    config: str | Path | Config,
    checkpoint: str | Path,
    out: str | Path,
    *,
    device: str = 'cpu',
    **options: Any,
) -> Path:
    """Writes a checkpoint's model, pruned or not, as an ONNX file with its post-processing inside.

    Args:
        config: the *unpruned* config that the checkpoint was trained with.
        checkpoint: a checkpoint file. Without a plan in it, the unpruned model is exported.
        out: the file to write. It must not exist.
        device: the device on which PyTorch runs the model, e.g. ``'cpu'`` or ``'cuda'``.
        options: further options: ``raw``, ``size``, ``dynamic``, ``opset``,
            ``with_preprocess``, ``check`` and ``batch``.

    Returns:
        ``out`` as a path.

    Raises:
        PruneError: the model cannot be exported, or the file's results are not PyTorch's. No file is
            left then.
    """
    out = Path(out)
    check_out(out)
    return export_model(load(config, checkpoint, device), out, **options)


def export_model(
    model: nn.Module,
    out: str | Path,
    *,
    raw: bool = False,
    size: Sequence[int] | None = None,
    dynamic: bool = False,
    opset: int | None = None,
    with_preprocess: bool = False,
    check: Sequence[str] = ('onnxruntime',),
    batch: int | None = None,
) -> Path:
    """Writes a model as an ONNX file with its post-processing inside.

    Args:
        model: a model with its ``cfg`` and ``dataset_meta``, as :func:`mmprune.load_pruned` gives it.
        out: the file to write. It must not exist.
        raw: whether the head's outputs are exported without post-processing, which works for more
            models.
        size: the fixed height and width of the input; ``None`` if ``dynamic`` or the config decides.
        dynamic: whether height and width are open, that is, any multiples of the metadata's
            ``pad_divisor``. With neither ``size`` nor ``dynamic``, the size is fixed if the config
            fixes it (by its test pipeline or its pose codec), and open otherwise.
        opset: the version of ONNX's operators; ``None`` means 18.
        with_preprocess: whether the graph takes BGR pictures, 0 to 255, and itself changes the channel
            order, subtracts the mean and divides by the standard deviation.
        check: the backends in which the file is compared with PyTorch: ``'onnxruntime'``,
            ``'openvino'``, both, or none.
        batch: the number of images of one run; ``None`` leaves it open, if the model allows that.

    Returns:
        ``out`` as a path.

    Raises:
        PruneError: the model's kind cannot be exported, the model cannot be traced, an operator is not
            in ONNX, an extra is missing, or the file's results are not PyTorch's. No file is left then.
    """
    out = Path(out)
    check_out(out)
    if size is not None and dynamic:
        raise PruneError(f'size={tuple(size)} and dynamic: give one of the two')
    if size is not None and (len(size) != 2 or any(side < 1 for side in size)):
        raise PruneError(f'size={tuple(size)}: must be a height and a width of at least 1')
    for name in check:
        if name not in BACKENDS:
            raise PruneError(f'check={name!r}: expected {" or ".join(BACKENDS)}')
    for name in ('onnx', 'onnxscript', *check):
        load_package(name)
    model = revert_sync_batchnorm(model)
    model.eval()  # not chained, since the train() of some detectors returns nothing
    network = RawNetwork(model) if raw else network_of(model)
    size = size_for(model, network, size, dynamic)
    divisor = divisor_of(model, size)
    sides = {} if size else {2: divisor, 3: divisor}
    program, batch = trace(model, network, size, sides, opset or OPSET, with_preprocess, batch)
    pictures = checks.pictures_for(size, divisor, batch or 2)
    file_metadata = metadata(model, network, size, with_preprocess, pictures[0].shape[1:3])
    program.model.metadata_props[METADATA] = json.dumps(file_metadata)
    temporary = out.with_name(f'{out.name}.part')
    try:
        program.save(temporary)
        for backend in check:
            checks.check_file(temporary, network, pictures, with_preprocess, backend)
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(out.parent)
    return out


def check_out(out: Path) -> None:
    """Raises a PruneError if ``out`` exists or its folder does not."""
    if out.exists():
        raise PruneError(f'{out}: exists; remove it, or give another --out')
    if not out.parent.is_dir():
        raise PruneError(f'{out}: there is no folder {out.parent}; make it first')


def load(config: str | Path | Config, checkpoint: str | Path, device: str = 'cpu') -> nn.Module:
    """Builds the checkpoint's model, pruned if the checkpoint has a plan, in evaluation mode."""
    cfg = config if isinstance(config, Config) else Config.fromfile(config)
    content = read_checkpoint(checkpoint)
    if plan_in(content) is not None:
        return load_pruned(cfg, checkpoint, device)
    print_log(f'{checkpoint}: has no plan, so the unpruned model is exported', 'current')
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    model = MODELS.build(without_pretrained(cfg.model))
    load_weights(model, content, checkpoint)
    model.cfg = cfg
    meta = (content.get('meta') or {}).get('dataset_meta') or {}
    model.dataset_meta = {str(key).lower(): value for key, value in meta.items()}
    return model.to(device).eval()


def strip(config: str | Path | Config, checkpoint: str | Path, out: str | Path) -> Path:
    """Writes a copy of a checkpoint without the parts that only training needs: the optimizer, the EMA
    copy, the log and the scores.

    The copy has the weights, the plan, and the names of classes or keypoints. It can be loaded like the
    checkpoint, but no training can be resumed from it.

    Args:
        config: the *unpruned* config that the checkpoint was trained with.
        checkpoint: a checkpoint file, pruned or not.
        out: the file to write. It must not exist.

    Returns:
        ``out`` as a path.

    Raises:
        PruneError: ``out`` exists or its folder does not, or the checkpoint does not fit the config.
    """
    out = Path(out)
    check_out(out)
    load(config, checkpoint)
    content = read_checkpoint(checkpoint)
    weights = weights_in(content, checkpoint)
    # ``torch.save`` writes the whole memory of which a tensor is a slice, so slices are copied.
    state = OrderedDict(
        (name, tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor)
        for name, tensor in weights.items()
    )
    state._metadata = getattr(weights, '_metadata', OrderedDict())  # the versions of the modules
    meta = content.get('meta') or {}
    kept = {key: meta[key] for key in (META, 'dataset_meta') if key in meta}
    buffer = io.BytesIO()
    torch.save({'state_dict': state, 'meta': kept}, buffer)
    return replace_file(out, buffer.getvalue())


# -- the graph ------------------------------------------------------------------------------------


def network_of(model: nn.Module) -> nn.Module:
    """Returns the module that is exported in a model's place. It maps images to detections, keypoints
    or scores.

    Raises:
        PruneError: there is none for the model's kind.
    """
    for make in (pose_network, classifier_network, two_stage_network, one_stage_network):
        network = make(model)
        if network is not None:
            return network
    heads = [name for name in ('bbox_head', 'roi_head', 'mask_head', 'head') if hasattr(model, name)]
    names = ', '.join(f'{name} {type(getattr(model, name)).__name__}' for name in heads)
    raise PruneError(
        f'{type(model).__name__} ({names or "no head"}): has no wrapper for export. There are those '
        f"for {'; '.join(KINDS)}. Export the head's outputs with --raw"
    )


class Graph(nn.Module):
    """The module that is traced: a network, perhaps preceded by preprocessing.

    Args:
        network: the network around the model, as :func:`network_of` makes it, or a ``RawNetwork``.
        preprocessor: the model's ``data_preprocessor``, whose channel order and normalization the graph
            applies to the images; ``None`` if the images are already prepared.
    """

    def __init__(self, network: nn.Module, preprocessor: nn.Module | None) -> None:
        super().__init__()
        self.network = network
        self.preprocessor = preprocessor
        self.output_names = getattr(network, 'output_names', None)

    def forward(self, images: Tensor) -> Any:
        if self.preprocessor is not None:
            if self.preprocessor._channel_conversion:
                images = torch.cat(images.split(1, 1)[::-1], 1)
            if self.preprocessor._enable_normalize:
                images = (images - self.preprocessor.mean) / self.preprocessor.std
        return self.network(images)


def trace(
    model: nn.Module,
    network: nn.Module,
    size: tuple[int, int] | None,
    sides: dict[int, int],
    opset: int,
    with_preprocess: bool,
    batch: int | None,
) -> tuple[Any, int | None]:
    """Traces a network to an ONNX program. Returns the program, and the number of images that it takes:
    ``batch``, which may be ``None`` for any number, or 1 if the number cannot be left open. ``sides``
    are the open sides, as :func:`to_onnx` takes them."""
    device = device_of(model)
    if isinstance(network, RawNetwork):
        shape = size or (STRIDE * 8, STRIDE * 10)
        network.try_out(torch.zeros(batch or 1, 3, *shape, device=device))
        if network.needs_samples and batch is None:
            print_log('The model asks for the size of each image: exported for batches of 1', 'current')
            batch = 1
    graph = Graph(network, model.data_preprocessor if with_preprocess else None).eval()
    # Tracers treat sides of 1 specially, and may identify equal sides. At this size no two maps of a
    # pyramid have equal sides, and none has a side of 1. Tracing computes no values, so a large size
    # takes no longer.
    shape = size or (STRIDE * 20, STRIDE * 24)
    example = torch.zeros(batch or 2, 3, *shape, device=device)
    try:
        return to_onnx(graph, example, ({} if batch else {0: 1}) | sides, opset), batch
    except PruneError as error:
        if batch:
            raise
        # Some models use the batch size as a Python number, such as Swin for its windows.
        try:
            program = to_onnx(graph, example[:1], sides, opset)
        except PruneError:
            raise error from None
        print_log('The model computes with the number of images: exported for batches of 1', 'current')
        return program, 1


def device_of(model: nn.Module) -> torch.device:
    """Returns the device of the model's parameters."""
    return next(model.parameters()).device


def divisor_of(model: nn.Module, size: Sequence[int] | None) -> int:
    """Returns the divisor of the sides of an input. It is at least ``STRIDE`` if the size is open
    (``None``), except for classifiers, which have no pyramid, and whose results padding would
    change."""
    divisor = getattr(model.data_preprocessor, 'pad_size_divisor', 1)
    return divisor if size or isinstance(model, ImageClassifier) else max(divisor, STRIDE)


def size_for(
    model: nn.Module, network: nn.Module, size: Sequence[int] | None, dynamic: bool
) -> tuple[int, int] | None:
    """Returns (height, width) of the input; ``None`` for an open size.

    Raises:
        PruneError: the model cannot take the size that was asked for.
    """
    fixed = getattr(network, 'input_size', None)
    if fixed is not None:
        if dynamic or size is not None and tuple(size) != tuple(fixed):
            raise PruneError(
                f'size={"dynamic" if dynamic else tuple(size)}: the codec of this model fixes its '
                f'input to {tuple(fixed)} (height, width); leave --size and --dynamic out'
            )
        return fixed
    if size is None and not dynamic:
        size = image_size(getattr(model, 'cfg', None), only_fixed=True)
        chosen = f'{size[0]} x {size[1]}, from the test pipeline' if size else 'open (dynamic)'
        print_log(f'Neither a size nor dynamic was asked for: the input is {chosen}', 'current')
    if size is None:
        return None
    divisor = divisor_of(model, size)
    if any(side % divisor for side in size):
        raise PruneError(
            f'size={tuple(size)}: this model pads its images to multiples of {divisor}; give such'
        )
    return int(size[0]), int(size[1])


# -- metadata -------------------------------------------------------------------------------------


def metadata(
    model: nn.Module,
    network: nn.Module,
    size: tuple[int, int] | None,
    with_preprocess: bool,
    counted_at: tuple[int, int],
) -> dict[str, Any]:
    """Makes the metadata of the file, which says how to use it. FLOPs are counted for images of
    ``counted_at`` (height, width)."""
    dataset_meta = getattr(model, 'dataset_meta', None) or {}
    entries = {
        'version': mmprune.__version__,
        'model': type(model).__name__,
        'task': 'detection',
        'classes': list(dataset_meta.get('classes') or []),
        **normalization_of(model.data_preprocessor),
        'with_preprocess': with_preprocess,
        'input_size': list(size) if size else None,
        'pad_divisor': divisor_of(model, size),
        'pad_value': getattr(model.data_preprocessor, 'pad_value', 0),
        **describe(getattr(model, 'cfg', None), size),
        'counted_at': list(counted_at),
        **costs(model, network, counted_at),
    }
    entries |= getattr(network, 'metadata', {})
    if entries['task'] == 'pose':
        entries['keypoints'] = keypoint_names(dataset_meta)
        del entries['classes']
    return entries


def costs(model: nn.Module, network: nn.Module, size: tuple[int, int]) -> dict[str, dict[str, int]]:
    """Counts FLOPs (multiply-adds) of one image and parameters, before and after pruning."""
    flops = flops_of(network, size)
    params = sum(parameter.numel() for parameter in model.parameters())
    plan = plan_of(model)
    before = plan.history[0]['params_before'] if plan is not None and plan.history else params
    return {
        'flops': {'before': round(flops / remaining(model)['flops']), 'after': flops},
        'params': {'before': before, 'after': params},
    }


def flops_of(network: nn.Module, size: tuple[int, int]) -> int:
    """Counts the multiply-adds of an exported network for one image of ``size`` (height, width)."""
    # torch's counter fails if a module is called with a parameter that has gradients. DETR passes its
    # queries, which are parameters, to its decoder.
    network = copied(network).requires_grad_(False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, *size, device=device_of(network)))
    return counter.get_total_flops() // 2
