pytest_plugins = ['tests.support', 'tests.pages']  # fixtures; the first chooses the module
