"""What the kernels of ONNX Runtime's providers take; targets ask here."""
