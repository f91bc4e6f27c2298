import gc
import subprocess
import sys
import warnings

import pytest

from diffusers_mcm.commands.startup import quick_imports, quiet_libraries


def test_the_collector_rests_while_it_lasts():
    with quick_imports():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ImportError), quick_imports():
        raise ImportError
    assert gc.isenabled()


def test_a_module_is_read_when_it_is_used():
    code = """
import sys
from diffusers_mcm.commands.startup import quick_imports
with quick_imports():
    import scipy.stats
    import scipy.stats
assert "scipy.stats._stats_py" not in sys.modules
assert abs(scipy.stats.norm.cdf(0) - 0.5) < 1e-12
from scipy.stats import bootstrap
import scipy.stats.distributions
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_function_may_be_taken_from_a_module_that_is_read_when_it_is_called():
    code = """
import sys
from diffusers_mcm.commands.startup import quick_imports
with quick_imports():
    from scipy import integrate
    from scipy.optimize import linear_sum_assignment
assert not {"scipy.optimize._minimize", "scipy.integrate._quadrature"} & sys.modules.keys()
for _ in range(2):
    rows, columns = linear_sum_assignment([[1, 0], [0, 1]], maximize=False)
    assert columns.tolist() == [1, 0]
assert "scipy.optimize._minimize" in sys.modules
import scipy.optimize
assert scipy.optimize.linear_sum_assignment is not linear_sum_assignment
assert abs(scipy.optimize.brentq(lambda x: x - 1, 0, 3) - 1) < 1e-9
assert abs(integrate.quad(lambda x: x, 0, 2)[0] - 2) < 1e-9
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_of_scipy_is_read_on_the_way_to_the_networks():
    code = """
import sys
from diffusers_mcm.commands.startup import quick_imports
with quick_imports():
    import peft, diffusers_mcm
    from diffusers import LMSDiscreteScheduler, UNet3DConditionModel
    from diffusers_mcm import AnimateDiffMCMPipeline, ModelScopeMCMPipeline
    from transformers import CLIPTextModel
assert "transformers.loss.loss_for_object_detection" in sys.modules
read = {"scipy.stats._stats_py", "scipy.optimize._minimize", "scipy.integrate._quadrature", "scipy.linalg"}
assert not read & sys.modules.keys(), read & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_our_warnings_are_heard_and_the_libraries_are_not(capsys):
    with quiet_libraries():
        for module in ("diffusers.utils", "diffusers_mcm.video_io"):
            warnings.warn_explicit(f"from {module}", UserWarning, "file.py", 1, module)
    assert capsys.readouterr().err == "diffusers-mcm: warning: from diffusers_mcm.video_io\n"


def test_bars_of_downloads_stay():
    from huggingface_hub.utils import are_progress_bars_disabled

    assert not are_progress_bars_disabled()
    with quiet_libraries():
        assert not are_progress_bars_disabled()
    assert not are_progress_bars_disabled()
