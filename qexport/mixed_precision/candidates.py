"""The schemes there are to choose from, for each target: weights in groups, from the smallest to the closest."""

# On CUDA zero points and groups of 16 keep a linear from the fast kernels.
SCHEMES = {
    "cpu": (
        "w4a16_g128", "w4a16_g64", "w4a16_g32", "w4a16_g16", "w4a16_g128_asym", "w4a16_g64_asym", "w4a16_g32_asym",
        "w8a16_g128", "w8a16_g32",
    ),
    "cuda": ("w4a16_g128", "w4a16_g64", "w4a16_g32", "w8a16_g128", "w8a16_g32"),
}  # fmt: skip
