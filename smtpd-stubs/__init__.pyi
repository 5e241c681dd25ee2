"""Types of the smtpd module, for Python 3.12 and later.

Up to 3.11 type checkers know the standard library's own module instead.

asyncore and asynchat have no types there, so their classes are written down
here as far as users of smtpd call or override them: without that every
attribute of a server or channel would be of type Any.
"""

import asynchat as asynchat  # smtpd.asynchat, smtpd.asyncore and smtpd.socket are in use
import asyncore as asyncore
import socket as socket
from collections import defaultdict, deque
from collections.abc import MutableMapping
from socket import socket as _Socket
from typing import Any, Final, NoReturn, Protocol, Self, TypeAlias

__all__ = ['SMTPChannel', 'SMTPServer', 'DebuggingServer', 'PureProxy', 'MailmanProxy']

# A socket address: (host, port), two more for IPv6, a path for AF_UNIX.  Any, as
# in typeshed's socket.accept(), so that a handler may name the one that it meets.
_Peer: TypeAlias = Any

# A message: bytes, or str with decode_data=True.  Parameters are contravariant: a
# union here would refuse each handler that says "data: bytes" (nearly all) or
# "data: str", because it takes less than the method that it overrides.  A generic
# class would need SMTPServer[str] to exist at run time.  So it is Any, and the
# handler's own annotation says which of the two it gets.
_Data: TypeAlias = Any

# What process_message() may return.  Return types are covariant: a handler may say
# "-> None", "-> str" or "-> str | None".
_Reply: TypeAlias = str | bytes | None

# Parameters again: a subclass may say "str", which is less than what it may get.
_Line: TypeAlias = str | Any  # str or bytes
_Argument: TypeAlias = str | Any  # str, or None if the verb stands alone

_SocketMap: TypeAlias = MutableMapping[int, Any]

class _SupportsWrite(Protocol):
    def write(self, msg: str, /) -> object: ...

__version__: str  # the banner's text; may be replaced
program: str
EMPTYSTRING: str
NEWLINE: str
COMMASPACE: str
DATA_SIZE_DEFAULT: Final[int]
DEBUGSTREAM: _SupportsWrite  # may be replaced

class Devnull:
    def write(self, msg: object) -> None: ...
    def flush(self) -> None: ...

class _Dispatcher:  # asyncore.dispatcher
    debug: bool
    connected: bool
    accepting: bool
    connecting: bool
    closing: bool
    addr: Any
    ignore_log_types: frozenset[str]
    socket: _Socket
    _map: _SocketMap
    _fileno: int | None
    def add_channel(self, map: _SocketMap | None = None) -> None: ...
    def del_channel(self, map: _SocketMap | None = None) -> None: ...
    def create_socket(self, family: int = ..., type: int = ...) -> None: ...
    def set_socket(self, sock: _Socket, map: _SocketMap | None = None) -> None: ...
    def set_reuse_addr(self) -> None: ...
    def readable(self) -> bool: ...
    def writable(self) -> bool: ...
    def listen(self, num: int) -> None: ...
    def bind(self, addr: Any) -> None: ...
    def connect(self, address: Any) -> None: ...
    def accept(self) -> tuple[_Socket, Any] | None: ...
    def send(self, data: bytes) -> int: ...
    def recv(self, buffer_size: int) -> bytes: ...
    def close(self) -> None: ...
    def log(self, message: str) -> None: ...
    def log_info(self, message: str, type: str = 'info') -> None: ...
    def handle_read_event(self) -> None: ...
    def handle_connect_event(self) -> None: ...
    def handle_write_event(self) -> None: ...
    def handle_expt_event(self) -> None: ...
    def handle_error(self) -> None: ...
    def handle_expt(self) -> None: ...
    def handle_read(self) -> None: ...
    def handle_write(self) -> None: ...
    def handle_connect(self) -> None: ...
    def handle_accept(self) -> None: ...
    def handle_accepted(self, conn: _Socket, addr: Any) -> None: ...
    def handle_close(self) -> None: ...

class _AsyncChat(_Dispatcher):  # asynchat.async_chat
    ac_in_buffer_size: int
    ac_out_buffer_size: int
    ac_in_buffer: bytes
    incoming: list[bytes]
    producer_fifo: deque[Any]
    terminator: bytes | int | None
    use_encoding: bool
    def collect_incoming_data(self, data: bytes) -> None: ...
    def found_terminator(self) -> None: ...
    def set_terminator(self, term: bytes | str | int | None) -> None: ...
    def get_terminator(self) -> bytes | int | None: ...
    def push_with_producer(self, producer: Any) -> None: ...
    def close_when_done(self) -> None: ...
    def initiate_send(self) -> None: ...
    def discard_buffers(self) -> None: ...

class SMTPChannel(_AsyncChat):
    __signature__: Any  # for inspect

    COMMAND: Final[int]
    DATA: Final[int]

    # Limits, which a subclass may change
    command_size_limit: int
    command_size_limits: defaultdict[str, int]
    idle_timeout_seconds: float | None
    recipient_limit: int | None
    error_limit: int | None
    unsent_reply_limit: int | None

    # "| Any": None in an object that __init__ has not seen

    # What lives with the connection
    smtp_server: SMTPServer | Any
    conn: _Socket | Any
    addr: Any
    peer: Any
    fqdn: str
    data_size_limit: int | None
    enable_SMTPUTF8: bool
    extended_smtp: bool
    seen_greeting: str

    # What lives with a mail transaction
    smtp_state: int
    mailfrom: str | None
    rcpttos: list[str]
    mail_options: list[str]
    rcpt_options: list[str]
    require_SMTPUTF8: bool
    received_lines: list[Any]  # of str with decode_data, else of bytes
    received_data: _Data
    num_bytes: int

    # Not documented, but in use
    _decode_data: bool
    _emptystring: Any  # str with decode_data, else bytes
    _linesep: Any
    _newline: Any
    _dotsep: Any

    # Names of Python 2.5 to 3.2, deprecated
    _SMTPChannel__server: SMTPServer
    _SMTPChannel__line: list[Any]
    _SMTPChannel__state: int
    _SMTPChannel__greeting: str
    _SMTPChannel__mailfrom: str | None
    _SMTPChannel__rcpttos: list[str]
    _SMTPChannel__data: _Data
    _SMTPChannel__fqdn: str
    _SMTPChannel__peer: Any
    _SMTPChannel__conn: _Socket
    _SMTPChannel__addr: Any

    # Takes all; __init__ says what
    def __new__(cls, *args: Any, **kwargs: Any) -> Self: ...
    def __init__(
        self,
        server: SMTPServer,
        conn: _Socket,
        addr: Any,
        data_size_limit: int | None = 33554432,
        map: _SocketMap | None = None,
        enable_SMTPUTF8: bool = False,
        decode_data: bool = False,
    ) -> None: ...
    @property
    def max_command_size_limit(self) -> int: ...
    def push(self, msg: _Line) -> None: ...
    def smtp_HELO(self, arg: _Argument) -> None: ...
    def smtp_EHLO(self, arg: _Argument) -> None: ...
    def smtp_MAIL(self, arg: _Argument) -> None: ...
    def smtp_RCPT(self, arg: _Argument) -> None: ...
    def smtp_DATA(self, arg: _Argument) -> None: ...
    def smtp_RSET(self, arg: _Argument) -> None: ...
    def smtp_NOOP(self, arg: _Argument) -> None: ...
    def smtp_HELP(self, arg: _Argument) -> None: ...
    def smtp_VRFY(self, arg: _Argument) -> None: ...
    def smtp_QUIT(self, arg: _Argument) -> None: ...
    def smtp_EXPN(self, arg: _Argument) -> None: ...
    def _set_post_data_state(self) -> None: ...
    def _set_rset_state(self) -> None: ...
    def _strip_command_keyword(self, keyword: str, arg: str) -> str: ...
    def _getaddr(self, arg: str) -> tuple[str, str]: ...
    def _getparams(self, params: list[str]) -> dict[str, str | bool] | None: ...

class SMTPServer(_Dispatcher):
    channel_class: type[SMTPChannel]
    process_message_threads: int
    channels_in_selector: bool
    listen_backlog: int
    accepts_per_event: int

    data_size_limit: int | None
    enable_SMTPUTF8: bool
    _localaddr: Any
    _remoteaddr: Any
    _decode_data: bool

    def __init__(
        self,
        localaddr: tuple[str | None, int],
        remoteaddr: tuple[str, int] | None,
        data_size_limit: int | None = 33554432,
        map: _SocketMap | None = None,
        enable_SMTPUTF8: bool = False,
        decode_data: bool = False,
    ) -> None: ...
    def process_message(
        self, peer: _Peer, mailfrom: str, rcpttos: list[str], data: _Data, **kwargs: Any
    ) -> _Reply: ...

class DebuggingServer(SMTPServer): ...

class PureProxy(SMTPServer):
    upstream_timeout_seconds: float
    upstream_command_timeout_seconds: float
    upstream_data_timeout_seconds: float
    upstream_block_timeout_seconds: float
    upstream_final_timeout_seconds: float
    upstream_connection_limit: int | None
    def _deliver(
        self, mailfrom: str, rcpttos: list[str], data: _Data
    ) -> dict[str, tuple[int, bytes]]: ...

class MailmanProxy(PureProxy):
    mailman_lmtp_address: tuple[str, int]

class Options:
    setuid: bool
    classname: str
    size_limit: int | None
    enable_SMTPUTF8: bool
    localhost: str
    localport: int
    remotehost: str
    remoteport: int

def usage(code: int, msg: object = '') -> NoReturn: ...
def parseargs() -> Options: ...
