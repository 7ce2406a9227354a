import subprocess
import sys


def test_importing_the_package_is_light():
    heavy = "('tensorflow_datasets', 'tensorflow', 'grain', 'sklearn')"
    script = f"import sys, repvgg_jax.data; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
