"""Development credentials do what TLS and Flower's node authentication ask of them."""

import socket
import ssl
import stat
import threading

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from experiments.cli import main
from experiments.credentials import write_credentials


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("credentials") / "tls"
    write_credentials(path, clients=2, hosts=["localhost", "127.0.0.1"], days=2)
    return path


def shake_hands(server_files, trusted, name):
    """Let a client that trusts `trusted` meet a server, and return the certificate's alternative names."""
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(server_files / "server.pem", server_files / "server.key")
    client_context = ssl.create_default_context(cafile=str(trusted / "ca.crt"))
    ours, theirs = socket.socketpair()

    def serve():
        try:
            server_context.wrap_socket(theirs, server_side=True).close()
        except (ssl.SSLError, OSError):
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client_context.wrap_socket(ours, server_hostname=name) as connected:
            return connected.getpeercert()["subjectAltName"]
    finally:
        ours.close()
        thread.join()


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1"])
def test_the_server_is_believed_by_those_who_trust_the_authority(folder, name):
    assert shake_hands(folder, folder, name) == (("DNS", "localhost"), ("IP Address", "127.0.0.1"))


def test_another_name_is_not_believed(folder):
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        shake_hands(folder, folder, "example.org")


def test_another_authority_is_not_believed(folder, tmp_path):
    write_credentials(tmp_path / "other", clients=0, hosts=["localhost"], days=2)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(folder, tmp_path / "other", "localhost")


def test_each_node_has_a_key_pair_of_its_own(folder):
    publics = []
    for client in (0, 1):
        private = load_ssh_private_key((folder / f"client_{client}").read_bytes(), None)
        public = load_ssh_public_key((folder / f"client_{client}.pub").read_bytes())
        assert isinstance(private.curve, ec.SECP384R1)
        assert private.public_key() == public
        publics.append(public.public_numbers())
    assert publics[0] != publics[1]


def test_private_files_are_readable_by_their_owner_only(folder):
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert all(modes[name] == 0o600 for name in ("ca.key", "server.key", "client_0", "client_1"))


def test_a_folder_with_files_is_left_alone(folder, capsys):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert main(["credentials", str(folder)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_command_says_what_each_file_is_for(tmp_path, capsys):
    assert main(["credentials", str(tmp_path / "tls"), "clients=1", "hosts=superlink.example", "days=1"]) == 0
    said = capsys.readouterr().err
    assert all(name in said for name in ("ca.crt", "server.pem", "client_N.pub"))
    assert not (tmp_path / "tls" / "client_1").exists()


@pytest.mark.parametrize("wrong", ["clients=-1", "days=0", "client=2"])
def test_wrong_options_are_refused(tmp_path, wrong):
    assert main(["credentials", str(tmp_path / "tls"), wrong]) == 2
    assert not (tmp_path / "tls").exists()
