"""A checkpoint as one ONNX file: build the model, wrap it, trace it, check the file, then name it."""

import contextlib
import copy
import functools
import json
import tempfile
from collections.abc import Iterator, Sequence
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
from mmprune.contexts import tensors_in
from mmprune.errors import PruneError
from mmprune.mm.atomic_files import sync_folder
from mmprune.mm.checkpoint import load_pruned, read_checkpoint, without_pretrained
from mmprune.mm.deploy import check as checks
from mmprune.mm.deploy.classify import classifier_wrapper
from mmprune.mm.deploy.decisions import recorded
from mmprune.mm.deploy.dense import dense_wrapper
from mmprune.mm.deploy.detr import detr_wrapper
from mmprune.mm.deploy.graph import to_onnx
from mmprune.mm.deploy.pipeline import describe, size_in
from mmprune.mm.deploy.pose import keypoint_names, pose_wrapper
from mmprune.mm.deploy.raw import RawNetwork
from mmprune.mm.deploy.runtime import METADATA, Runtime, load_package, open_model
from mmprune.mm.deploy.sparse import sparse_wrapper
from mmprune.mm.deploy.two_stage import two_stage_wrapper
from mmprune.mm.models.classifier import ImageClassifier
from mmprune.surgery.build import remaining
from mmprune.surgery.meta import load_weights, plan_in
from mmprune.surgery.plan import plan_of

OPSET = 18
STRIDE = 32
"""What sides are a multiple of where the size is open: pyramids add maps of neighbouring levels, which
only fit together so."""

KINDS = (
    'one-stage detectors with a dense head (RetinaNet, ATSS, FCOS, GFL, RTMDet, YOLOX, SSD and others '
    "that inherit mmdet's decoding)",
    'two-stage detectors (Faster R-CNN, R-FCN, Cascade R-CNN, Mask R-CNN, Sparse R-CNN, QueryInst)',
    'DETR',
    'top-down pose estimators with heatmaps or SimCC',
    'classifiers (ImageClassifier)',
)


def export(
    config: str | Path | Config,
    checkpoint: str | Path,
    out: str | Path,
    *,
    raw: bool = False,
    size: Sequence[int] | None = None,
    dynamic: bool = False,
    opset: int | None = None,
    with_preprocess: bool = False,
    check: Sequence[str] = ('onnxruntime',),
    device: str = 'cpu',
) -> Path:
    """Writes a checkpoint's model, pruned or not, as an ONNX file with its post-processing inside.

    Args:
        config: the *unpruned* config that the checkpoint was trained with.
        checkpoint: a checkpoint file; without a plan in it the unpruned model is exported.
        out: the file to write; must not exist.
        raw: the head's outputs, without post-processing; of any model.
        size: height and width of the input, fixed.
        dynamic: height and width open, any multiples of the metadata's ``pad_divisor``. With neither,
            a fixed size where the config has one (its test pipeline's, a pose codec's), else open.
        opset: version of ONNX's operators, 18 by default.
        with_preprocess: the graph takes BGR pictures, 0 to 255, and does channel order, mean and
            standard deviation itself.
        check: with which backends the file is compared with PyTorch's own predictions: any of
            ``onnxruntime`` and ``openvino``.
        device: where PyTorch runs.

    Returns:
        ``out`` as a path.

    Raises:
        PruneError: there is no wrapper for the model, it can't be traced, an operator is not in ONNX,
            an extra is missing, or the file's results are not PyTorch's. No file is left then.
    """
    out = Path(out)
    checked_arguments(out, size, dynamic, check)
    cfg = config if isinstance(config, Config) else Config.fromfile(config)
    model = load(cfg, checkpoint, device)
    return export_model(
        model, out, raw=raw, size=size, dynamic=dynamic, opset=opset,
        with_preprocess=with_preprocess, check=check,
    )  # fmt: skip


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
    """:func:`export` of a model that is there, with its ``cfg`` and ``dataset_meta``, as
    :func:`mmprune.load_pruned` gives it. ``batch``: images of one run, by default any number."""
    out = Path(out)
    checked_arguments(out, size, dynamic, check)
    model = revert_sync_batchnorm(model)
    model.eval()  # some detectors' own train() returns nothing
    network = RawNetwork(model) if raw else wrapper_for(model)
    size = size_for(model, network, size, dynamic)
    batch = batch_for(network, batch, size, device_of(model))
    graph = Graph(network, model.data_preprocessor if with_preprocess else None).eval()
    probing = copy.copy(graph)
    probing.probing = True
    sides = {} if size else {2: divisor_of(model, size), 3: divisor_of(model, size)}
    # Sizes at which no two maps have equal sides, and none has a side of one. Nothing is computed.
    shape = size or (STRIDE * 20, STRIDE * 24)
    example = torch.zeros(batch or 2, 3, *shape, device=device_of(model))
    free = ({} if batch else {0: 1}) | sides
    try:
        program = to_onnx(graph, example, free, opset or OPSET)
    except PruneError as error:
        if batch:
            raise
        # Some make a number of the batch's size (windows of Swin), or sizes as tensors meet it.
        batch, free, example = 1, sides, example[:1]
        try:
            program = to_onnx(graph, example, free, opset or OPSET)
        except PruneError:
            raise error from None
        print_log('The model computes with the number of images: exported for batches of 1', 'current')
    pictures = checks.pictures_for(size, divisor_of(model, size), batch or 2)
    about = metadata(model, network, size, with_preprocess, pictures[0].shape[1:3])
    program.model.metadata_props[METADATA] = json.dumps(about)
    part = out.with_name(f'{out.name}.part')

    @functools.cache
    def probe(backend: str) -> Runtime:
        again = to_onnx(probing, example, free, opset or OPSET)
        again.model.metadata_props[METADATA] = json.dumps(about)
        with tempfile.TemporaryDirectory() as folder:
            again.save(Path(folder) / 'probe.onnx')
            return open_model(Path(folder) / 'probe.onnx', backend)

    try:
        program.save(part)
        for backend in check:
            checks.check_file(part, model, network, pictures, with_preprocess, backend, probe)
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    sync_folder(out.parent)
    return out


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def batch_for(
    network: nn.Module, batch: int | None, size: tuple[int, int] | None, device: torch.device
) -> int | None:
    """How many images a run of the file takes; ``None`` for any number."""
    if isinstance(network, RawNetwork):
        shape = size or (STRIDE * 8, STRIDE * 10)
        network.try_out(torch.zeros(batch or 1, 3, *shape, device=device))
        if network.needs_samples and batch is None:
            print_log('The model asks for the size of each image: exported for batches of 1', 'current')
            return 1
    return batch


class Graph(nn.Module):
    """What is exported: a network, and before it perhaps what its ``data_preprocessor`` does to the
    values of a picture. ``probing``: its decisions come as further outputs."""

    def __init__(self, network: nn.Module, preprocessor: nn.Module | None) -> None:
        super().__init__()
        self.network = network
        self.preprocessor = preprocessor
        self.output_names = getattr(network, 'output_names', None)
        self.probing = False

    def forward(self, images: Tensor) -> Any:
        prepared = self.preprocessor
        if prepared is not None:
            if prepared._channel_conversion:
                images = torch.cat(images.split(1, 1)[::-1], 1)
            if prepared._enable_normalize:
                images = (images - prepared.mean) / prepared.std
        if not self.probing:
            return self.network(images)
        with recorded() as decisions:
            out = self.network(images)
        return *tensors_in(out), *decisions


def checked_arguments(
    out: Path, size: Sequence[int] | None, dynamic: bool, check: Sequence[str]
) -> None:
    """Everything that can be told to be wrong before the model is built."""
    if out.exists():
        raise PruneError(f'{out}: exists; remove it, or give another --out')
    if not out.parent.is_dir():
        raise PruneError(f'{out}: there is no folder {out.parent}; make it first')
    if size is not None and dynamic:
        raise PruneError(f'size={tuple(size)} and dynamic: give one of the two')
    if size is not None and (len(size) != 2 or any(side < 1 for side in size)):
        raise PruneError(f'size={tuple(size)}: must be a height and a width of at least 1')
    unknown = [name for name in check if name not in ('onnxruntime', 'openvino')]
    if unknown:
        raise PruneError(f'check={unknown[0]!r}: expected onnxruntime or openvino')
    for name in ('onnx', 'onnxscript', *check):
        load_package(name)


def load(cfg: Config, checkpoint: str | Path, device: str = 'cpu') -> nn.Module:
    """The checkpoint's model, pruned where it has a plan."""
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


def wrapper_for(model: nn.Module) -> nn.Module:
    """The module to export in a model's place: images in, detections or keypoints out.

    Raises:
        PruneError: there is none for its kind.
    """
    for wrapper in (
        pose_wrapper, classifier_wrapper, two_stage_wrapper, sparse_wrapper, detr_wrapper,
        dense_wrapper,
    ):  # fmt: skip
        network = wrapper(model)
        if network is not None:
            return network
    heads = [name for name in ('bbox_head', 'roi_head', 'mask_head', 'head') if hasattr(model, name)]
    told = ', '.join(f'{name} {type(getattr(model, name)).__name__}' for name in heads)
    raise PruneError(
        f'{type(model).__name__} ({told or "no head"}): has no wrapper for export. There are those for '
        + '; '.join(KINDS) + ". Export the head's outputs with --raw"
    )  # fmt: skip


# -- sizes ----------------------------------------------------------------------------------------


def divisor_of(model: nn.Module, size: Sequence[int] | None) -> int:
    """What the sides of an input are multiples of. Classifiers have no pyramid, and padding would
    change what they see."""
    own = getattr(model.data_preprocessor, 'pad_size_divisor', 1)
    return own if size or isinstance(model, ImageClassifier) else max(own, STRIDE)


def size_for(
    model: nn.Module, network: nn.Module, size: Sequence[int] | None, dynamic: bool
) -> tuple[int, int] | None:
    """(height, width), or ``None`` for open ones.

    Raises:
        PruneError: the model can't take such a size.
    """
    fixed = getattr(network, 'input_size', None)
    if fixed is not None and (dynamic or size is not None and tuple(size) != tuple(fixed)):
        raise PruneError(
            f'size={"dynamic" if dynamic else tuple(size)}: the codec of this model fixes its input to '
            f'{tuple(fixed)} (height, width); leave --size and --dynamic out'
        )
    if fixed is None and size is None and not dynamic:
        size = size_in(getattr(model, 'cfg', None))
        told = f'{size[0]} x {size[1]}, from the test pipeline' if size else 'open (dynamic)'
        print_log(f'Neither a size nor dynamic was asked for: the input is {told}', 'current')
    if fixed is None and size is not None:
        divisor = divisor_of(model, size)
        if any(side % divisor for side in size):
            raise PruneError(
                f'size={tuple(size)}: this model pads its images to multiples of {divisor}; give such'
            )
    chosen = fixed or size
    return None if chosen is None else (int(chosen[0]), int(chosen[1]))


# -- metadata -------------------------------------------------------------------------------------


def metadata(
    model: nn.Module,
    network: nn.Module,
    size: tuple[int, int] | None,
    with_preprocess: bool,
    counted_at: tuple[int, int],
) -> dict[str, Any]:
    """What the file says of itself. ``counted_at``: (height, width) that FLOPs are counted for."""
    prepared = model.data_preprocessor
    normal = getattr(prepared, '_enable_normalize', False)
    names = getattr(model, 'dataset_meta', None) or {}
    about = {
        'version': mmprune.__version__,
        'model': type(model).__name__,
        'task': 'detection',
        'classes': list(names.get('classes') or []),
        'mean': prepared.mean.flatten().tolist() if normal else None,
        'std': prepared.std.flatten().tolist() if normal else None,
        'bgr_to_rgb': bool(getattr(prepared, '_channel_conversion', False)),
        'with_preprocess': with_preprocess,
        'input_size': list(size) if size else None,
        'pad_divisor': divisor_of(model, size),
        'pad_value': getattr(prepared, 'pad_value', 0),
        **describe(getattr(model, 'cfg', None), size),
        'counted_at': list(counted_at),
        **costs(model, network, counted_at),
    }
    about |= getattr(network, 'metadata', {})
    if about['task'] == 'pose':
        about['keypoints'] = keypoint_names(names)
        del about['classes']
    return about


def costs(model: nn.Module, network: nn.Module, size: tuple[int, int]) -> dict[str, dict[str, int]]:
    """FLOPs (multiply-adds) of one image and parameters, before and after pruning."""
    counter = FlopCounterMode(display=False)
    with frozen(model), counter, torch.no_grad():
        network(torch.zeros(1, 3, *size, device=device_of(model)))
    flops = counter.get_total_flops() // 2
    params = sum(parameter.numel() for parameter in model.parameters())
    plan = plan_of(model)
    left = remaining(model)
    before = plan.history[0]['params_before'] if plan is not None and plan.history else params
    return {
        'flops': {'before': round(flops / left['flops']), 'after': flops},
        'params': {'before': before, 'after': params},
    }


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """torch's counter wants gradients of parameters that modules are called with (queries)."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
