pytest_plugins = ['tests.support']  # its fixtures; and it chooses the module before any test
