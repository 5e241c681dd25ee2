"""Messages of real clients: swaks, curl and msmtp."""
import re
import subprocess

import pytest

from tests.support import (
    clean_environment,
    command_line,
    find_tool,
    proxy_to,
    read_until,
    with_x_peer,
)

# with the headers that msmtp would add
TOOL_MESSAGE = (b'From: a@example.com\r\nMessage-ID: <4@example.com>\r\nDate: now\r\n'
                b'Subject: from a tool\r\n\r\n.dot\r\n..\r\nL\xc3\xb6we\r\n\r\nend\r\n')
PRINTED_BY_PROXY = '''\
---------- MESSAGE FOLLOWS ----------
b'From: a@example.com'
b'Message-ID: <4@example.com>'
b'Date: now'
b'Subject: from a tool'
b'X-Peer: 127.0.0.1'
b''
b'.dot'
b'..'
b'L\\xc3\\xb6we'
b''
b'end'
------------ END MESSAGE ------------
'''
TOOLS = {
    'swaks': lambda tool, port: [
        tool, '--server', '127.0.0.1', '--port', str(port), '--helo', 'client.example',
        '--from', 'a@example.com', '--to', 'b@example.com', '--data', '-'],
    'curl': lambda tool, port: [
        tool, '--silent', '--show-error', 'smtp://127.0.0.1:%d/client.example' % port,
        '--noproxy', '*', '--mail-from', 'a@example.com', '--mail-rcpt', 'b@example.com',
        '--upload-file', '-'],
    'msmtp': lambda tool, port: [
        tool, '--host=127.0.0.1', '--port=%d' % port, '--domain=client.example', '--tls=off',
        '--auth=off', '--from=a@example.com', 'b@example.com'],
}


def run_tool(name, port, message):
    command = TOOLS[name](find_tool(name, name), port)
    if name != 'curl':
        message = message.replace(b'\r\n', b'\n')  # these make CRLF themselves
    if name == 'swaks':
        message = message[:-1]  # and it adds a line end
    return subprocess.run(command, input=message, capture_output=True, env=clean_environment(),
                          timeout=60)


@pytest.mark.real
@pytest.mark.parametrize('name', TOOLS)
def test_message_of_a_real_client_is_printed_at_once_by_the_debugging_server(name):
    find_tool(name, name)
    with command_line('-c', 'DebuggingServer') as (process, address):
        for _ in range(2):
            done = run_tool(name, address[1], TOOL_MESSAGE)
            assert done.returncode == 0, done
            printed = read_until(process.stdout, b'END MESSAGE ------------\n').decode()
            # the options that a client sends with MAIL come on a line of their own
            assert re.sub(r'mail options: \[.*\]\n\n?', '', printed) == PRINTED_BY_PROXY


@pytest.mark.real
@pytest.mark.parametrize('name', TOOLS)
def test_real_client_is_told_when_the_upstream_refuses(upstream, name):
    with proxy_to(upstream) as proxy:
        assert run_tool(name, proxy.port_number, TOOL_MESSAGE).returncode == 0
        upstream.refused = {'b@example.com': '550 5.1.1 No such user'}
        assert run_tool(name, proxy.port_number, TOOL_MESSAGE).returncode != 0
    assert [message[:2] for message in upstream.messages] == [('a@example.com', ['b@example.com'])]
    assert upstream.messages[0][2] == with_x_peer(TOOL_MESSAGE)
