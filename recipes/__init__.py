"""Lightning Fabric recipes built on vlmrb_torchrl."""

import ctypes
import os
import sys

if os.environ.get("MUJOCO_GL", "").lower() == "egl" and sys.platform == "linux":
    # torchrl imports MuJoCo, which then ends by a traceback that names no remedy.
    try:
        ctypes.CDLL("libEGL.so.1")
    except OSError as error:
        sys.exit(f"MUJOCO_GL is egl: {error}; apt-get install libegl1, or unset MUJOCO_GL")
