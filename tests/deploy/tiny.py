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
