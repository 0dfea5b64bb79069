"""An export in stages, each a function from one named thing to the next, which knows all that the one before knew.

prepare -> capture -> plan -> calibrate -> quantize -> lower -> package; `pipeline.run` calls one after another.
"""
