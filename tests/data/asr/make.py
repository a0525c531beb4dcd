"""Make the recogniser of the tests: it hears low tones and high tones.

A CTC model of NeMo's signature for onnx-asr, 80 mel features to log-probabilities every
8 frames: a token where the lower or the upper half of the features is loud. Needs the
package ``onnx``: python tests/data/asr/make.py
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

FOLDER = Path(__file__).parent
LOUD = 0.5  # of features with mean 0 and deviation 1


def main() -> None:
    halves = np.zeros((3, 80, 1), np.float32)  # low, high, blank
    halves[0, :20], halves[1, 40:] = 1 / 20, 1 / 40
    nodes = [
        helper.make_node("Conv", ["audio_signal", "halves"], ["bands"]),
        helper.make_node(
            "AveragePool",
            ["bands"],
            ["pooled"],
            kernel_shape=[8],
            strides=[8],
            ceil_mode=1,
            count_include_pad=0,
        ),
        helper.make_node("Add", ["pooled", "offset"], ["logits"]),
        helper.make_node("Transpose", ["logits"], ["logprobs"], perm=[0, 2, 1]),
    ]
    offset = np.array([[[0.0], [0.0], [LOUD]]], np.float32)
    graph = helper.make_graph(
        nodes,
        "tones",
        [
            helper.make_tensor_value_info(
                "audio_signal", TensorProto.FLOAT, ["batch", 80, "frames"]
            ),
            helper.make_tensor_value_info("length", TensorProto.INT64, ["batch"]),
        ],
        [
            helper.make_tensor_value_info(
                "logprobs", TensorProto.FLOAT, ["batch", "tokens", 3]
            )
        ],
        [
            onnx.numpy_helper.from_array(halves, "halves"),
            onnx.numpy_helper.from_array(offset, "offset"),
        ],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    onnx.checker.check_model(model)
    onnx.save(model, FOLDER / "model.onnx")
    (FOLDER / "vocab.txt").write_text("\u2581low 0\n\u2581high 1\n<blk> 2\n", "utf-8")
    (FOLDER / "config.json").write_text(
        '{"model_type": "nemo-conformer-ctc", "features_size": 80, '
        '"subsampling_factor": 8}\n'
    )


if __name__ == "__main__":
    main()
