"""What a packager would notice: what the source distribution and the wheel have, and say."""
import email
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

from tests.support import (
    HERE,
    MADE_HERE,
    clean_environment,
    copy_of_the_source,
    need_module,
)

pytestmark = pytest.mark.slow  # the same on all Pythons


def run(*command, directory=HERE, **environment):
    done = subprocess.run(
        [sys.executable, '-m', *command], cwd=str(directory), timeout=300,
        env={**clean_environment(), **environment}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding='utf-8')
    assert done.returncode == 0, done.stdout
    return done.stdout


def build(source, directory):
    """Makes the sdist, and the wheel from it; returns their paths."""
    need_module('build')
    run('build', '--no-isolation', '--outdir', str(directory), directory=source)
    sdist, wheel = sorted(directory.iterdir(), key=lambda path: path.suffix)
    return sdist, wheel


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    directory = tmp_path_factory.mktemp('built')
    return build(copy_of_the_source(directory / 'source'), directory / 'dist')


@pytest.fixture(scope='module')
def unpacked(built, tmp_path_factory):
    directory = tmp_path_factory.mktemp('unpacked')
    run('tarfile', '-e', str(built[0]), str(directory))
    source, = directory.iterdir()
    return source


def files_below(directory):
    return {os.path.relpath(os.path.join(parent, name), str(directory))
            for parent, directories, names in os.walk(str(directory))
            for name in names if not MADE_HERE & set(parent.split(os.sep))}


def test_the_sdist_has_tests_and_manual_and_nothing_that_was_made(unpacked):
    found = files_below(unpacked)
    assert found >= {
        'CHANGES.rst', 'LICENSE', 'README.rst', 'smtpd.py', 'test_smtpd.py', 'tox.ini'}
    for directory in 'benchmarks', 'docs', 'smtpd-stubs', 'tests':
        assert {name for name in found if name.startswith(directory + os.sep)} == {
            os.path.join(directory, name) for name in files_below(os.path.join(HERE, directory))}
    assert not any(name.startswith('.') or name.endswith('.pyc') for name in found)


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
    with tarfile.open(str(built[0])) as sdist:
        name, = (each for each in sdist.getnames() if each.count('/') == 1
                 and each.endswith('/PKG-INFO'))
        assert email.message_from_bytes(sdist.extractfile(name).read()).items() == metadata.items()
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


def test_the_build_needs_the_module_and_its_stubs_alone(unpacked, tmp_path):
    """Packagers take the rest away."""
    need_module('pip')
    source = tmp_path / 'source'
    shutil.copytree(str(unpacked), str(source))
    for name in 'benchmarks', 'docs', 'tests':
        shutil.rmtree(str(source / name))
    run('pip', '--disable-pip-version-check', 'install', '--quiet', '--no-deps',
        '--no-build-isolation', '--target', str(tmp_path / 'site'), '.', directory=source)
    assert (tmp_path / 'site' / 'smtpd.py').read_bytes() == (source / 'smtpd.py').read_bytes()


def test_what_is_installed_passes_without_the_source(built, unpacked, tmp_path):
    """And is installed without a network."""
    need_module('pip')
    site = str(tmp_path / 'site')
    run('pip', '--disable-pip-version-check', 'install', '--quiet', '--no-index', '--no-deps',
        '--no-build-isolation', '--target', site, str(built[0]), directory=tmp_path)
    source = tmp_path / 'source'
    shutil.copytree(str(unpacked), str(source))
    os.remove(str(source / 'smtpd.py'))
    shutil.rmtree(str(source / 'smtpd-stubs'))
    run('pytest', '-q', '-k', 'TestModule or TestSmtplib or TestCommandLine', 'test_smtpd.py',
        directory=source, PYSMTPD_TEST_MODULE_DIR=site, PYTEST_ADDOPTS='')
