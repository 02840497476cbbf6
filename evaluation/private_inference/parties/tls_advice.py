"""What it means that TLS fails, and what to do."""

import ssl


# What to do about OpenSSL's X509_V_ERR_... of the peer's certificate.
UNKNOWN_AUTHORITY = "it is not signed by an authority of this side's --ca"
OTHER_NAME = "its subjectAltName has to name the host that --connect names (a common name does not count)"
VERIFICATION_ADVICE = {
    9: "it is not valid yet: compare the clocks",
    10: "its owner needs a new one",
    18: UNKNOWN_AUTHORITY,
    19: UNKNOWN_AUTHORITY,
    20: UNKNOWN_AUTHORITY,
    21: UNKNOWN_AUTHORITY,
    26: "it is for the other side only (extendedKeyUsage)",
    62: OTHER_NAME,
    64: OTHER_NAME,
}
# What OpenSSL says of a connection, in words.
NO_TLS = "the peer speaks no TLS: give --cert, --key and --ca on both sides or on neither"
OWN_CERTIFICATE = "the peer does not accept this side's --cert"
TLS_ADVICE = {
    "WRONG_VERSION_NUMBER": NO_TLS,
    "PACKET_LENGTH_TOO_LONG": NO_TLS,
    "RECORD_LAYER_FAILURE": NO_TLS,
    "HTTP_REQUEST": "the peer speaks HTTP",
    "UNSUPPORTED_PROTOCOL": "the peer speaks no TLS 1.3",
    "TLSV1_ALERT_PROTOCOL_VERSION": "the peer speaks no TLS 1.3",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "the peer has no certificate",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "the peer wants a certificate: give --cert and --key",
    "TLSV1_ALERT_UNKNOWN_CA": f"{OWN_CERTIFICATE}, which no authority of its --ca has signed",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": f"{OWN_CERTIFICATE}, which has expired",
    "SSLV3_ALERT_BAD_CERTIFICATE": OWN_CERTIFICATE,
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": OWN_CERTIFICATE,
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": f"{OWN_CERTIFICATE}, which is for the other side only (extendedKeyUsage)",
    "UNEXPECTED_EOF_WHILE_READING": "the peer ended the connection: it has other certificates, or no TLS",
}


def explain(error: ssl.SSLError) -> str | None:
    """An error of OpenSSL in words; `None` if it names no reason."""
    if isinstance(error, ssl.SSLCertVerificationError):
        advice = VERIFICATION_ADVICE.get(error.verify_code)
        return f"{error.verify_message.rstrip('.')}{f': {advice}' if advice else ''}"
    return TLS_ADVICE.get(error.reason, error.reason)
