import pytest
from data.pictures import write_archive, write_folder


@pytest.fixture(params=["folder", "zip"])
def make(request, tmp_path):
    """Writes the files {name: content} as a folder or as an archive."""

    def make(files):
        if request.param == "zip":
            return write_archive(tmp_path / "pictures.zip", files)
        return write_folder(tmp_path / "pictures", files)

    return make
