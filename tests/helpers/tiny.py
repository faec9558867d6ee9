"""A file of three operators, built by hand: what runs a file needs no export of a network."""

import json

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def save(path, metadata, batch=None, size=(4, 6)):
    """``mean`` (N, 3, 1, 1) and ``count`` (N,), int64, of images (N, 3, height, width); the path.

    ``batch``, ``size``: what the file is for; ``None``: any. ``metadata``: the JSON, or text, or none.
    """
    height, width = size or ('height', 'width')
    batch = batch or 'batch'
    graph = helper.make_graph(
        [
            helper.make_node('ReduceMean', ['input', 'axes'], ['mean'], keepdims=1),
            helper.make_node('ReduceMax', ['input', 'others'], ['largest'], keepdims=0),
            helper.make_node('Cast', ['largest'], ['count'], to=TensorProto.INT64),
        ],
        'tiny',
        [helper.make_tensor_value_info('input', TensorProto.FLOAT, [batch, 3, height, width])],
        [
            helper.make_tensor_value_info('mean', TensorProto.FLOAT, [batch, 3, 1, 1]),
            helper.make_tensor_value_info('count', TensorProto.INT64, [batch]),
        ],
        [
            numpy_helper.from_array(np.array([2, 3]), 'axes'),
            numpy_helper.from_array(np.array([1, 2, 3]), 'others'),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 18)], ir_version=9)
    if metadata is not None:
        text = metadata if isinstance(metadata, str) else json.dumps(metadata)
        helper.set_model_props(model, {'mmprune': text})
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def detector(path, dets, labels, masks=None, size=None, **metadata):
    """A file that finds the same on every image: ``dets`` (K, 5), ``labels`` (K,), ``masks`` (K, h, w);
    the path."""
    found = {'dets': np.asarray(dets, np.float32), 'labels': np.asarray(labels, np.int64)}
    if masks is not None:
        found['masks'] = np.asarray(masks, np.float32)
    kinds = {'dets': TensorProto.FLOAT, 'labels': TensorProto.INT64, 'masks': TensorProto.FLOAT}
    nodes = [
        helper.make_node('Shape', ['input'], ['images'], start=0, end=1),
        # A term of the input, so that nothing in it is constant.
        helper.make_node('ReduceMean', ['input'], ['mean'], keepdims=0),
        helper.make_node('Mul', ['mean', 'zero'], ['nothing']),
    ]
    constants = [numpy_helper.from_array(np.float32(0), 'zero')]
    for name, value in found.items():
        constants += [
            numpy_helper.from_array(value[None], f'{name}_of_one'),
            numpy_helper.from_array(np.array(value.shape), f'{name}_shape'),
        ]
        nodes += [
            helper.make_node('Concat', ['images', f'{name}_shape'], [f'{name}_sizes'], axis=0),
            helper.make_node('Expand', [f'{name}_of_one', f'{name}_sizes'], [f'{name}_of_all']),
            helper.make_node('Cast', ['nothing'], [f'{name}_nothing'], to=kinds[name]),
            helper.make_node('Add', [f'{name}_of_all', f'{name}_nothing'], [name]),
        ]
    height, width = size or ('height', 'width')
    graph = helper.make_graph(
        nodes, 'detector',
        [helper.make_tensor_value_info('input', TensorProto.FLOAT, ['batch', 3, height, width])],
        [
            helper.make_tensor_value_info(name, kinds[name], ['batch', *value.shape])
            for name, value in found.items()
        ],
        constants,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 18)], ir_version=9)
    about = {
        'version': '0', 'task': 'detection', 'classes': [], 'mean': [123.675, 116.28, 103.53],
        'std': [58.395, 57.12, 57.375], 'bgr_to_rgb': True, 'with_preprocess': False,
        'input_size': size and list(size), 'pad_divisor': 32, 'pad_value': 0,
    }  # fmt: skip
    helper.set_model_props(model, {'mmprune': json.dumps(about | metadata)})
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path
