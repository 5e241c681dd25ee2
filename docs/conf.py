"""How Sphinx builds the manual: ``tox -e docs``."""

import configparser
import os
import re
import sys

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
nitpick_ignore = [('py:class', 'asyncore.dispatcher'), ('py:class', 'asynchat.async_chat')]
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


def mark(is_standard=True):
    return ['.. rst-class:: mark', '',
            'Standard' if is_standard else 'pysmtpd only: no effect below Python 3.12', '']


def attributes_of_columns(lines, class_name):
    """Make attributes of a docstring's two columns: "name     what it is"."""
    is_table = False
    made = []
    for line in lines:
        row = re.match(r'(\w+) {2,}(?=\S)', line)
        if row:
            made += ['', '.. attribute:: ' + row[1], '']
            made += ['   ' + text for text in mark(row[1] in STANDARD.get(class_name, ()))]
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
    name = name.removeprefix('smtpd.')
    if what == 'module':
        return
    if what == 'class':
        attributes_of_columns(lines, name)
    lines[:0] = mark()


def setup(app):
    app.connect('autodoc-process-docstring', process_docstring)
