"""The stubs: what mypy and pyright make of programs that use the module."""
import json
import os
import re
import shutil
import subprocess
import sys

import pytest

import smtpd
from tests.pages import BLOCKS, block, save_block
from tests.support import need_module

STUBS = os.path.join(os.path.dirname(os.path.abspath(smtpd.__file__)), 'smtpd-stubs')

SAMPLE = '''
from typing import Any, Optional

import asyncore
import smtpd


class OfText(smtpd.SMTPServer):
    def process_message(self, peer: Any, mailfrom: str, rcpttos: list[str], data: str,
                        mail_options: Optional[list[str]] = None,
                        rcpt_options: Optional[list[str]] = None,
                        **kwargs: object) -> Optional[str]:
        return '550 No ' + data.upper()


class OfBoth(smtpd.DebuggingServer):
    def process_message(self, peer: object, mailfrom: str, rcpttos: list[str],
                        data: 'bytes | str', **kwargs: Any) -> 'str | bytes | None':
        return super().process_message(peer, mailfrom, rcpttos, data, **kwargs)


class Proxy(smtpd.PureProxy):
    upstream_connection_limit = 5
    process_message_threads = 4

    def _deliver(self, mailfrom: str, rcpttos: list[str],
                 data: bytes) -> dict[str, tuple[int, bytes]]:
        return super()._deliver(mailfrom, rcpttos, data.upper())


class Channel(smtpd.SMTPChannel):
    idle_timeout_seconds = None
    recipient_limit = 10

    def smtp_XFOO(self, arg: Optional[str]) -> None:
        self.push('250 %s' % (arg or self._SMTPChannel__mailfrom))

    def smtp_MAIL(self, arg: Optional[str]) -> None:
        address, rest = self._getaddr(self._strip_command_keyword('FROM:', arg or ''))
        if address:
            super().smtp_MAIL(arg)

    def smtp_RCPT(self, arg: str) -> None:
        super().smtp_RCPT(arg)

    def push(self, msg: str) -> None:
        super().push(msg)
        super().push(msg.encode())

    def found_terminator(self) -> None:
        line = self._emptystring.join(self.received_lines)
        print(line, self.smtp_state == self.DATA, self.rcpttos[0], self.get_terminator())
        super().found_terminator()


OfText.channel_class = Channel
server = OfText((None, 0), ('localhost', 25), data_size_limit=None, map={}, decode_data=True)
print(server.socket.getsockname(), server._remoteaddr, smtpd.DEBUGSTREAM, smtpd.__version__)
server.close()
asyncore.loop()
smtpd.asyncore.close_all()
'''

FAULTS = '''
import smtpd

class Channel(smtpd.SMTPChannel):
    def smtp_XFOO(self, arg: str) -> None:
        self.psuh('250 OK')

    def smtp_MAIL(self, arg: str) -> int:
        self.smtp_server.nonsense()

class Server(smtpd.SMTPServer):
    def process_message(self, peer: object, mailfrom: str, rcpttos: str, data: bytes,
                        **kwargs: object) -> int:
        return 250

Server('localhost', 25)
'''
FAULTY_LINES = [6, 8, 9, 12, 16]

TYPED_BLOCKS = sorted(name for name, (language, text) in BLOCKS.items()
                      if language == 'python' and text.startswith('# ')
                      and not name.startswith(('tutorial-', 'own-', 'calls')))


@pytest.fixture(scope='module')
def typed_programs(tmp_path_factory):
    """A directory with the sample program and each recipe, and the stubs as pip installs them."""
    directory = tmp_path_factory.mktemp('types')
    (directory / 'sample.py').write_text(SAMPLE)
    (directory / 'faults.py').write_text(FAULTS)
    (directory / 'revealed.py').write_text(
        'import smtpd\nreveal_type(smtpd.SMTPServer.process_message)\n')
    for name in TYPED_BLOCKS:
        save_block(directory, name)
    # The manual's configuration; the rest is for packages without types, or not installed here.
    (directory / 'mypy.ini').write_text(block('mypy-ini') + '''
[mypy-django.*,flask.*,flask_mail.*,aiosmtpd.*,pytest.*]
ignore_missing_imports = true
''')
    shutil.copytree(STUBS, directory / 'site' / 'smtpd-stubs')
    shutil.copy(smtpd.__file__, directory / 'site')
    return directory


def run(directory, *command, **environment):
    return subprocess.run(
        [sys.executable, '-m', *command], cwd=directory, env=dict(os.environ, **environment),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding='utf-8', timeout=300)


def mypy(directory, target, names):
    need_module('mypy')
    return run(directory, 'mypy', '--python-version', target, '--cache-dir', os.devnull, *names,
               MYPYPATH=str(directory / 'site'))


def pyright(directory, target, names):
    need_module('pyright')
    (directory / 'pyrightconfig.json').write_text(json.dumps({
        # Frameworks may not be installed here; asyncore has no stubs.
        'pythonVersion': target, 'extraPaths': ['site'], 'reportMissingImports': 'none',
        'reportMissingModuleSource': 'none', 'include': names}))
    return run(directory, 'pyright', '-p', str(directory), PYRIGHT_PYTHON_IGNORE_WARNINGS='1')


@pytest.mark.slow
@pytest.mark.parametrize('target', ['3.12', '3.13', '3.14', '3.15'])
@pytest.mark.parametrize('checker', [mypy, pyright])
class TestCheckers:
    def test_take_the_sample_program_and_each_recipe(self, typed_programs, checker, target):
        names = sorted(path.name for path in typed_programs.glob('*.py'))
        names.remove('faults.py')
        assert len(names) == len(TYPED_BLOCKS) + 2
        outcome = checker(typed_programs, target, names)
        assert outcome.returncode == 0, outcome.stdout
        assert re.search(r'mailfrom: str, rcpttos: list\[str\].* -> \(?str \| bytes \| None',
                         outcome.stdout, re.DOTALL)

    def test_find_faults(self, typed_programs, checker, target):
        outcome = checker(typed_programs, target, ['faults.py'])
        found = re.findall(r'faults.py:(\d+):.* error', outcome.stdout)
        assert set(map(int, found)) == set(FAULTY_LINES), outcome.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 12), reason='up to 3.11 the stubs are not used')
def test_the_stubs_agree_with_the_module(typed_programs):
    need_module('mypy')
    site = str(typed_programs / 'site')  # what pip installed, or the source
    # It takes anything, and shows the signature of __init__().
    (typed_programs / 'allowed').write_text('smtpd.SMTPChannel.__new__\n')
    outcome = run(typed_programs, 'mypy.stubtest', '--mypy-config-file', 'mypy.ini',
                  '--allowlist', 'allowed', 'smtpd', MYPYPATH=site, PYTHONPATH=site)
    assert outcome.returncode == 0, outcome.stdout
