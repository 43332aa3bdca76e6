"""What setup.cfg cannot say: how the type hints of the module reach those who install it."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithStubs(build_py):
    """Puts the module into the wheel a second time, as a package of stubs.

    PEP 561 has no py.typed for a module that is in no package: mypy ignores its hints; a folder with the marker alone
    would hide the module from Pyright. A package of stubs serves both, and a module is a stub of itself. Since it is
    copied here, the repository holds neither a second file nor a link.
    """

    def run(self):
        """Build as always, and copy."""
        super().run()
        if not self.editable_mode:
            stubs = Path(self.build_lib, "geneva_drive-stubs")
            self.mkpath(str(stubs))
            self.copy_file("geneva_drive.py", str(stubs / "__init__.pyi"))


setup(cmdclass={"build_py": BuildWithStubs})
