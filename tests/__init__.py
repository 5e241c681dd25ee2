import pytest

pytest.register_assert_rewrite('tests.support')  # it is imported before pytest makes it a plugin
