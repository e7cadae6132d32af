"""ONNX and TensorRT export of the modules the runtime runs."""
