"""A source distribution that is the same whoever makes it; setup.cfg names its class."""
import gzip
import os
import tarfile

from setuptools.command.sdist import sdist


class ReproducibleSdist(sdist):
    """Takes all times from SOURCE_DATE_EPOCH where that is set; setuptools does so for wheels."""

    def make_archive(self, base_name, format, root_dir=None, base_dir=None, **kwargs):
        if format != 'gztar' or 'SOURCE_DATE_EPOCH' not in os.environ:
            return super().make_archive(base_name, format, root_dir, base_dir, **kwargs)
        epoch = int(os.environ['SOURCE_DATE_EPOCH'])

        def without_origin(member):
            member.mtime = epoch
            member.mode = 0o755 if member.mode & 0o100 else 0o644
            member.uid = member.gid = 0
            member.uname = member.gname = ''
            return member

        path = base_name + '.tar.gz'
        with gzip.GzipFile(path, 'wb', mtime=epoch) as compressed:
            with tarfile.open(fileobj=compressed, mode='w') as archive:
                archive.add(base_dir, filter=without_origin)
        return path
