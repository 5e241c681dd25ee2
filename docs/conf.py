"""How Sphinx builds the manual: ``tox -e docs``."""

import ast
import configparser
import os
import re
import sys

from docutils import nodes

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))  # before the standard library's smtpd, up to 3.11

metadata = configparser.ConfigParser()
metadata.read(os.path.join(HERE, '..', 'setup.cfg'), encoding='utf-8')

project = metadata['metadata']['name']
author = metadata['metadata']['author']
release = version = metadata['metadata']['version']
copyright = author

extensions = ['sphinx.ext.autodoc']
default_role = 'literal'  # a docstring's `name`
nitpick_ignore = [('py:class', name) for name in (
    'asyncore.dispatcher', 'asynchat.async_chat', 'socket.socket', 'collections.defaultdict',
    'bool', 'bytes', 'dict', 'float', 'int', 'list', 'str', 'tuple', 'type')]
autodoc_member_order = 'bysource'
add_module_names = False
smartquotes = False  # '' in a docstring is Python
toc_object_entries_show_parents = 'hide'

html_theme = 'furo'
html_title = 'pysmtpd %s' % release
html_show_sourcelink = False
html_show_sphinx = False
html_static_path = ['static']
html_css_files = ['manual.css']

# The attributes that the standard library's module had; its methods are all there.
STANDARD = {
    'SMTPServer': {'channel_class', 'data_size_limit', 'enable_SMTPUTF8'},
    'SMTPChannel': {
        'smtp_server', 'conn', 'addr', 'peer', 'fqdn', 'received_lines', 'num_bytes', 'smtp_state',
        'seen_greeting', 'extended_smtp', 'mailfrom', 'rcpttos', 'mail_options', 'rcpt_options',
        'require_SMTPUTF8', 'received_data', 'data_size_limit', 'enable_SMTPUTF8',
        'command_size_limit', 'command_size_limits', 'COMMAND', 'DATA'},
    'Options': {'setuid', 'classname', 'size_limit', 'enable_SMTPUTF8', 'localhost', 'localport',
                'remotehost', 'remoteport'},
}
MARKS = {'MailmanProxy': 'Standard up to Python 3.10'}
HAVE_NO_DEFAULT = {'smtp_server', 'conn', 'peer', 'fqdn', 'received_lines', 'rcpttos',
                   'mail_options', 'rcpt_options', 'command_size_limits', 'channel_class'}
MEANINGS_OF_TYPES = [('Final[int]', 'int'), ('_Socket', 'socket.socket'), (' | Any', ''),
                     ('[Any]', ''), ('_Data', 'bytes | str'), ('defaultdict', 'dict')]


def read_types():
    """{class: {attribute: type}} from the stubs."""
    with open(os.path.join(HERE, '..', 'smtpd-stubs', '__init__.pyi'), encoding='utf-8') as file:
        stubs = ast.parse(file.read())
    types = {}
    for cls in stubs.body:
        for each in getattr(cls, 'body', ()):
            if isinstance(each, ast.AnnAssign):
                text = ast.unparse(each.annotation)
                for short, meaning in MEANINGS_OF_TYPES:
                    text = text.replace(short, meaning)
                types.setdefault(cls.name, {})[each.target.id] = text
    return types


TYPES = read_types()


def mark(text='Standard'):
    return ['.. rst-class:: mark', '', text, '']


def attribute(cls, name):
    """The directive for an attribute, with its type and its default."""
    lines = ['', '.. attribute:: ' + name]
    annotation = TYPES.get(cls.__name__, {}).get(name, 'Any')
    if annotation != 'Any':
        lines.append('   :type: ' + annotation)
    if name in vars(cls) and name not in HAVE_NO_DEFAULT:
        lines.append('   :value: %r' % (vars(cls)[name],))
    is_standard = name in STANDARD.get(cls.__name__, ())
    marked = mark('Standard' if is_standard else 'pysmtpd only')
    return lines + [''] + ['   ' + line for line in marked]


def attributes_of_columns(lines, cls):
    """Make attributes of a docstring's two columns: "name     what it is"."""
    is_table = False
    made = []
    for line in lines:
        row = re.match(r'(\w+) {2,}(?=\S)', line)
        if row:
            made += attribute(cls, row[1])
            is_table = True
            line = '   ' + line[row.end():]
        elif is_table and line.startswith('        '):
            line = '   ' + line.strip()
        elif is_table:
            is_table = False
            made.append('')
        made.append(line)
    lines[:] = made


def process_docstring(app, what, name, obj, options, lines):
    if what == 'class':
        attributes_of_columns(lines, obj)
    lines[:] = [re.sub(r"(?<![\w.`'])[a-z]\w+\(\)(?!`)", r'`\g<0>`', line) for line in lines]
    if what != 'module':
        lines[:0] = mark(MARKS.get(obj.__name__, 'Standard') if what == 'class' else 'Standard')


def link_names(app, doctree, docname):
    """Let each ``name`` of the reference lead there, wherever the manual uses it."""
    domain = app.env.get_domain('py')
    for literal in list(doctree.findall(nodes.literal)):
        outside = literal
        while outside is not None and not isinstance(outside, (nodes.reference, nodes.title)):
            outside = outside.parent
        full_name = full_name_of(literal.astext().removesuffix('()'), literal, domain.objects)
        if outside is None and full_name:
            found = domain.objects[full_name]
            page = app.builder.get_relative_uri(docname, found.docname)
            literal.replace_self(nodes.reference(
                '', '', literal.deepcopy(), internal=True, refuri=page + '#' + found.node_id))


def full_name_of(name, literal, objects):
    """The object of that name: of the class around it, or of the only class that has it."""
    cls = literal
    while cls is not None and not (cls.tagname == 'desc' and cls['objtype'] == 'class'):
        cls = cls.parent
    if cls is not None:
        likely = [cls[0]['ids'][0] + '.' + name, 'smtpd.SMTPServer.' + name]
        likely = [each for each in likely if each in objects][:1]
    else:
        likely = [each for each in objects if each.endswith('.' + name)]
    if 'smtpd.' + name in objects:
        return 'smtpd.' + name
    return likely[0] if len(likely) == 1 else None


def link_rfcs(app, doctree, docname):
    """Let "RFC 5321, 4.5.3.2" lead to that section."""
    for text in list(doctree.findall(nodes.Text)):
        parent = text.parent
        if isinstance(parent, (nodes.literal, nodes.reference, nodes.literal_block, nodes.title)):
            continue
        parts = re.split(r'(RFC \d+(?:,\s\d(?:[\d.]*\d)?)?)', text.astext())
        if len(parts) == 1:
            continue
        made = []
        for part in parts:
            found = re.match(r'RFC (\d+)(?:,\s(.+))?', part)
            if found:
                address = 'https://www.rfc-editor.org/rfc/rfc' + found[1]
                if found[2]:
                    address += '#section-' + found[2]
                made.append(nodes.reference('', part, refuri=address))
            elif part:
                made.append(nodes.Text(part))
        parent.replace(text, made)


def setup(app):
    app.connect('autodoc-process-docstring', process_docstring)
    app.connect('doctree-resolved', link_names)
    app.connect('doctree-resolved', link_rfcs)
