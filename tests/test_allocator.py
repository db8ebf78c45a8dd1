import os
import platform
import subprocess
import sys

import pytest

from sca.allocator import SETTINGS

COUNT_PAGE_FAULTS = """
import resource, sys
import numpy as np
from sca.allocator import keep_freed_memory
print(keep_freed_memory())
np.ones(2**24)
start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start)
"""
requires_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")


def run_with_settings(**settings):
    settings["NUMPY_MADVISE_HUGEPAGE"] = "0"
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS} | settings
    result = subprocess.run(
        [sys.executable, "-c", COUNT_PAGE_FAULTS], env=environment, capture_output=True, text=True, check=True
    )
    is_changed, num_page_faults = result.stdout.split()
    return is_changed == "True", int(num_page_faults)


@requires_glibc
@pytest.mark.slow
def test_keep_freed_memory_reuses_memory():
    is_changed, num_page_faults = run_with_settings()
    assert is_changed
    assert num_page_faults < 100  # 32,768 pages


@requires_glibc
@pytest.mark.slow
def test_keep_freed_memory_respects_environment_variables():
    is_changed, num_page_faults = run_with_settings(MALLOC_TRIM_THRESHOLD_="1000000", MALLOC_MMAP_THRESHOLD_="1000000")
    assert not is_changed
    assert num_page_faults > 1000
