import pytest
from data.pictures import write_archive, write_folder


@pytest.fixture(params=["folder", "zip"])
def make(request, tmp_path):
    """Writes the files {name: content} as a folder or as an archive, of another name beside those written before."""

    def make(files, name="pictures"):
        if request.param == "zip":
            return write_archive(tmp_path / f"{name}.zip", files)
        return write_folder(tmp_path / name, files)

    return make
