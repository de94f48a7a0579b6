from __future__ import annotations

import os
import platform
import re
import socket

import numpy as np

from blocksparse.perf.machine import describe_machine, usable_cores


def test_machine_says_what_matters_and_not_whose_it_is():
    machine = describe_machine(torch="9.9")
    text = str(machine)
    assert machine.processor
    assert machine.cores == usable_cores() >= 1
    assert dict(machine.versions)["NumPy"] == np.__version__
    assert "torch 9.9" in text
    assert platform.python_version() in text
    words = re.split(r"[\s,;()]+", text)
    assert socket.gethostname() not in words
    assert not [word for word in words if os.sep in word]
