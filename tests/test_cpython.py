"""Judge from outside: CPython's own suites of its smtpd, against ours."""
import json
import os
import shutil
import subprocess
import sys

import pytest

import smtpd
from tests.support import missing, python_of

RUN_A_SUITE = '''
import json, unittest, warnings
with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    import smtpd
    import test.mock_socket, test.support, test.test_smtpd
result = unittest.TestResult()
suite = unittest.defaultTestLoader.loadTestsFromModule(test.test_smtpd)
expected = suite.countTestCases()
suite.run(result)
print(json.dumps({
    'files': [module.__file__ for module in (
        smtpd, test.test_smtpd.smtpd, test.test_smtpd, test.mock_socket, test.support)],
    'expected': expected,
    'run': result.testsRun,
    'not passed': [[str(case), text] for case, text in result.failures + result.errors]
                  + [str(case) for case in result.unexpectedSuccesses],
    'skipped': [[str(case), reason] for case, reason in result.skipped],
}))
'''


@pytest.mark.parametrize('version', ['3.9', '3.10', '3.11'])
def test_the_suite_of_cpython_passes_unmodified(version, tmp_path):
    if sys.implementation.name != 'cpython' and '%d.%d' % sys.version_info[:2] != version:
        pytest.skip("CPython's test.support needs CPython's _testcapi")
    library = subprocess.check_output(
        [python_of(version), '-c', 'import os; print(os.path.dirname(os.__file__))'], text=True)
    source = os.path.join(library.strip(), 'test')
    if not os.path.exists(os.path.join(source, 'test_smtpd.py')):
        missing('the test package of Python ' + version)
    package = tmp_path / 'test'
    package.mkdir()
    (package / '__init__.py').touch()
    shutil.copytree(os.path.join(source, 'support'), package / 'support')
    for name in ('test_smtpd.py', 'mock_socket.py'):
        shutil.copy(os.path.join(source, name), package)

    module_directory = os.path.dirname(os.path.abspath(smtpd.__file__))
    run = subprocess.run(
        [sys.executable, '-c', RUN_A_SUITE], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, universal_newlines=True, cwd=tmp_path,
        env={**os.environ, 'PYTHONPATH': os.pathsep.join([str(tmp_path), module_directory])})
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])

    assert result['files'] == [
        os.path.abspath(smtpd.__file__)] * 2 + [
        str(package / name) for name in ('test_smtpd.py', 'mock_socket.py', 'support/__init__.py')]
    assert result['not passed'] == []
    assert result['run'] == result['expected'] > 90
    assert [skip for skip in result['skipped'] if 'IPv6' not in skip[1]] == []
