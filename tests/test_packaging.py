"""What a packager would notice: what the source distribution and the wheel have, and say."""
import email
import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from tests.support import HERE, clean_environment, copy_of_the_source, need_module

pytestmark = pytest.mark.slow  # the same on all Pythons


def run(*command, directory=HERE, **environment):
    done = subprocess.run(
        [sys.executable, '-m', *command], cwd=str(directory), timeout=300,
        env={**clean_environment(), **environment}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding='utf-8')
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    """The paths of the sdist and of the wheel that is made from it."""
    need_module('build')
    directory = tmp_path_factory.mktemp('built')
    run('build', '--no-isolation', '--outdir', str(directory / 'dist'),
        directory=copy_of_the_source(directory / 'source'))
    sdist, wheel = sorted((directory / 'dist').iterdir(), key=lambda path: path.suffix)
    return sdist, wheel


@pytest.fixture(scope='module')
def unpacked(built, tmp_path_factory):
    directory = tmp_path_factory.mktemp('unpacked')
    run('tarfile', '-e', str(built[0]), str(directory))
    source, = directory.iterdir()
    return source


def test_the_manifest_names_all_that_git_tracks():
    if not os.path.exists(os.path.join(HERE, '.git')):
        pytest.skip('no repository')  # an unpacked source distribution
    need_module('check_manifest')
    run('check_manifest', '--no-build-isolation', HERE)


def test_the_wheel_has_one_module_and_its_stubs(built):
    with zipfile.ZipFile(str(built[1])) as wheel:
        names = set(wheel.namelist())
    information = {name for name in names if name.startswith('pysmtpd-')}
    assert names - information == {'smtpd.py', 'smtpd-stubs/__init__.pyi'}
    assert {name.partition('/')[2] for name in information} == {
        'METADATA', 'RECORD', 'WHEEL', 'licenses/LICENSE', 'top_level.txt'}
    assert built[1].name.endswith('-py3-none-any.whl')


def test_the_metadata_say_what_an_installer_needs(built):
    with zipfile.ZipFile(str(built[1])) as wheel:
        name, = (each for each in wheel.namelist() if each.endswith('/METADATA'))
        metadata = email.message_from_bytes(wheel.read(name))
    assert metadata['Name'] == 'pysmtpd'
    assert metadata['Requires-Python'] == '>=3.9'
    assert metadata['License-Expression'] == 'MIT'
    assert metadata.get_all('Provides-Extra') == ['test', 'docs']
    needed = metadata.get_all('Requires-Dist')
    assert [each for each in needed if 'extra ==' not in each] == [
        'pyasyncore; python_version >= "3.12"', 'pyasynchat; python_version >= "3.12"']
    versions = {each.rpartition(' ')[2] for each in metadata.get_all('Classifier')
                if each.startswith('Programming Language :: Python :: 3.')}
    assert {'3.9', '3.12', '%d.%d' % sys.version_info[:2]} <= versions


def test_the_page_of_the_package_renders(built):
    need_module('twine')
    assert run('twine', 'check', '--strict', *map(str, built)).count('PASSED') == 2


def test_what_is_installed_passes_without_the_source(unpacked, tmp_path):
    """It is built without a network, of the module and its stubs alone: packagers do both."""
    need_module('pip')
    site = str(tmp_path / 'site')
    shutil.copytree(str(unpacked), str(tmp_path / 'source'), ignore=shutil.ignore_patterns(
        'benchmarks', 'docs', 'tests', 'test_smtpd.py'))
    run('pip', '--disable-pip-version-check', 'install', '--quiet', '--no-index', '--no-deps',
        '--no-build-isolation', '--target', site, '.', directory=tmp_path / 'source')
    shutil.copytree(str(unpacked), str(tmp_path / 'tests'), ignore=shutil.ignore_patterns(
        'smtpd.py', 'smtpd-stubs'))
    run('pytest', '-q', '-k', 'TestModule or TestSmtplib or TestCommandLine', 'test_smtpd.py',
        directory=tmp_path / 'tests', PYSMTPD_TEST_MODULE_DIR=site, PYTEST_ADDOPTS='')
