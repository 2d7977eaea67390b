"""The Triton kernels against the reference. Triton decides at its import whether it interprets, hence the process."""


def test_in_the_interpreter(interpreted):
    """All tests of `kernels_interpreted.py`; their own report is printed."""
    process, output = interpreted
    code = process.wait()
    output.seek(0)
    print(output.read()[-25000:])
    assert code == 0
