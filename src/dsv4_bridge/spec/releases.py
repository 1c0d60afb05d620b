"""What is known of the published files of each release: facts to hold a folder against, without the Hub.

What follows from the exact tensors of a release is not typed here but derived (`convert.releases`): the names of its
shards, which tensors lie in each and, as the order of their data is known, the size of each shard to the byte. The
derived sizes add up to the published 159,617,149,040 (Flash), 166,886,535,336 (Flash-0731), 864,721,029,744 (Pro) and
892,744,322,880 (Pro-0813) bytes; those of V4.1-Flash are the listed ones, one by one. Of the Base releases no exact
total is published.

| fact | source |
|---|---|
| config.json | SHA-256 that several third parties recorded for the Hub's file at the revision; Flash-Base: none known |
| index | SHA-256 recorded for the Hub's file by several third parties; Pro and the Base releases: none known |
| shards of Flash | SHA-256 and sizes pinned by a public inference library's loader for this revision |
| shards of Flash-0731 | SHA-256 of the Git LFS objects, as a public loader pins them for this revision |
| Pro-0813, all files | the Hub's listing of the revision, as kept at bojieli/OpenTallas @3b1d6322, data/inventory |
| V4.1-Flash, all files | `releases_v41` |
| tokenizer, generation config | SHA-256 recorded by third parties |

The listing of Pro-0813 has, beside the SHA-256 of a shard, the Git blob of its LFS pointer, which holds that SHA-256
and the size: they agree, 59 of the 66 by calculation, the other 7 compared by eye. The digests of Flash and Flash-0731
have one source each.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from . import releases_v41
from .variants import VARIANTS, Variant


class Published(NamedTuple):
    """What is known of a file: bytes, and `sha256:…` or Git's `blob:…` of its content; None: not known."""

    size: int | None = None
    digest: str | None = None


@dataclass(frozen=True)
class Release:
    """A published checkpoint and what is known of its files.

    Attributes:
        variant: its numbers and encodings.
        revision: commit on the Hub.
        files: name -> what is known, other than shards.
        shards: what is known of each shard, in order.
        ordered: whether the sizes of shards follow from its tensors, their order being known.
        others: digest -> whose file this is, of files of other revisions that are met under the same name.
    """

    variant: Variant
    revision: str
    files: Mapping[str, Published]
    shards: tuple[Published, ...]
    ordered: bool = True
    others: Mapping[str, str] | None = None

    @property
    def name(self) -> str:
        """Of its variant."""
        return self.variant.name


def _shards(hashes: str) -> tuple[Published, ...]:
    return tuple(Published(None, f"sha256:{line}") for line in hashes.split())


_FLASH = """
5176586613905d4beaadbaea1cfecd1693e17f9da4a0ea09d99aab7d3f2f5b7c
f04048189d3b472b26d7d02331edd0412e85b184725041c978fdce793a286a0d
df5f80b9b4ca54edf7bda4e640a1b0d1bb95d5995843198dfcce2af0bfc4cb35
948250b46a6f92df92ef093ab2d0023c31f924232846a84affe84fa3c7794f5c
9fda158bc636215aea4f6834821c81f59eea3733223c874ab66b9f3d6740c4c1
51a65e6d9d0ccb70013e25ae70a50b177af8f97e59ac798c2d0ed5ebb169fe7a
2d782c46d6d293189e01ed13ea108de355fd32a9902cea77b264dfc9c4f10c42
b7d9d8d8932e12ea113f2e83ff412fc1d6b663acedf7f34bbe2bfff41a71c595
3197a42d282a8368d4286d11aed52d7fee7928d7950fee4dc18d5154b8111060
c9cef4200444326f8d802bc1bb5be7c1d15af4bfdec0426db7e841a7bd516a28
916b0b34b713c51dc7a83935ccd9e07c4af017ddfcc5feaeec8faa26f1263f89
05739c7d91a302f41a4627587982016a6cc874f875a3ea299d1f2e1dcea5cbb6
47c5e416b60b9bef9e9005cdad9c991a306ab2dd25a95e1994dda30bd4011905
c881e2671ab45428d824197f174d64fb4403b9530451cb1b0b3899881ab34b7e
cb3daae8e465c5b49f2b439c045971e96cd658fda152882605e9717573d4c8f5
9eba661fba3162a8a051b0283ad3c11c7c17b33d99684e7029ddf732494bd069
0c36cbc026c5067164cb506ac6522078478feb539fef264289ef70f1d1688f54
1298a07452a409ddbcc5172a4f57a011193bea4f16a6a964c3dd8531cbc06b49
d3687748aff78adf42b2bbf7469b8df92e1e3e5dcd90c1c050c8fac62d1fe77a
906c652f3c36b510689c2637ebe5172865cc6ccc17515b9fc70ee9e048e7c5af
f270bf4d0f0067165020baf3c11264a177182918c1ebeec21d2bf33166b44592
d02261b8f1c8d697bac4b23ec9a8423096fb1a1edf923ed1c2faea6cebdb05e8
69fab8bfa1cdfd819382cdef5923dcf10d81879aceb0dc0950be45a6d45771f2
baba23c06a7b80e108334eb9fe30349de851e822e9b72df756614ae6b5088dbf
085b7736ebe3d69574930187f8b213f84b35b36852f0a505067f8755e8b11c89
fdde6791ab713c93cb256d05d9560d5ecfd2b913563658b62d32af9a17a91546
2f207b9aef9c56e38f73234e9c5c118c1898676c8ab83d2be0dd410fb196bd01
2cc519b5a03a30d45717ffb8408a4f833f3a94f70e35a1de38e95a0ffcdc152e
d10bf34c789f9294d2cc50b695d259dc1d0d5b2303105329be370eb55f0fd882
0f1c471fa9d9d3612c94039e9efb2a60f367782918f236e95c45ab3fe36c166c
beafa59d64fae3a5c636be4b2a08956d8d5abaf70856a4a5adb70a200011e43e
5c6b2934d87ada60493e201652d72075c56ce608091a3d395f3d8e31b6ce036a
c05f917e873d2da0513385c3c30758d29b4b9d244ffde2a5258ae2e6745f23da
666b77201ec6946fb1f299f2ebcb462bce53575a97a91fb30db806bbcd099100
5e6b9a54fd149ea4908f81cdffd6b09701d9c98e5e7041bb5bd00c6d5c85623f
ab72ad9d171fc0867350948e5091878b3c2445a5cfb8a83dd8c25d4272628107
93d68bcfc36fdf239f901653c0e96c5d45d8fce4f5be633bbbf93cc75067ec5d
809fb799edcf1d9b4511dea68a1ea35c5fc03858e0611a0010913f1c84e66efe
49dba248917454c0a8ac90cc5a012fee625fea6672ae55c40d32a5922a29dd91
09a7b8b6957ff3426d7461dd49a158f4576c0277ab18b78a881094aef29ba84b
a564ac6c6cc7514beadb2e1d9d1fc2baeed5e680ba1b75cd9afc7a50fb90ee85
bd3f5b898b041559a534c81a2f9bb53a8f9744ee8db37ed11b3a5c9fcf848882
85a414c7991c1276e8db780f6a4390ac25b8f2c7fdb3551831993adb9db69430
438b052b8a2d650939e63704f55f1352b946152ba6633cb256c3864ef21d2f62
9a0fd242134e9ebe4e6993a7631692944838e4fdf20067b3219caa48eab68045
f58f722893a6148216a2155cee4a57fe691cea4d3b323135c433a936b932055d
"""
_FLASH_0731 = """
f3668ba4cccf1ca6a7eb84e888fb92c1cdc7204d472ba9db771e6fd3abf6b874
77b26c939a0e25b3113c8d6bb04e1901a748bd4a7d2589e3bfdaabdf1e9bba14
412abf4c906faadc221ef0cb50f90fe20bde8454a08ad4dc2364b6b79e7fda5c
9610f56bc587fb0ff9a8b68a60299482ee8c433fe5b5587e4257aca98add4a2e
f87a5ac7b8becc31f9c3169afd3a6f33fb82b4af9e21022e3755a10bc28f0180
4a4f3764e3fc772b9fba67f0a44ef68e18f178b6f00faa80b75db549e51894cd
df81bb80e27a689e01fa579eebd6499f86e0b6105f7fea18961aa5eebbbee9bc
224968d2b27f8669365ec08657a768dfec40da0585f85f302a31495931f6a526
04d69ef1071fff8721c62968c200a5583122b59b015e9ef9b2978bfed271b2b7
627145f4ebeb1cc3f5bdd03416b8cb7370b3c96974853cbeb8e5516ad5713e49
e4b8e601dcbebe902e0102e7b098b670a121cb8b9564dd719fc41d782c8416e0
64ed4e5f6126ba029c462c9d5fca0fc907c5f855b4ba01194d79560f6db16e42
8dfe199d07c07ddd141c2c0136a2237f1161250a1a03ebe8deaabac93440da1d
45db2f540f825f92453c50335e49aede58cca56bc578d1787c12a0fbca6593e5
5810381a0f05b7381c002d299ed6ac19e42eba8070dd17e2703546944d84f292
e0530b7024771b0ce2df9b40bcc2232578f3300178487ec216863b0b2835617b
ed11130247118b185ade893c0109bad896dd394cb1e066ce4fce044176261d94
e393fea96da2a3414ef089354fc32e1c8891954de40958c84d2c2ecf80365b25
a74ca4d3e8e82ce20c458bb8b1900110b753793ad4c58d08f38995f719c616f7
9f556769926e60309e8defe45ab59fc8b26ae460d30c190cd746a3d78c11e2c2
1671cce7f90d781f796b5ca6bf32dd1aeb740abcb2735e41ffd28f62485ce005
decd67a4bd97a75fa36861d2ad3067afeefa6a04a20da997fe6c19f171e70132
c61a3e179cdbee19bfb8cbc4e111928ce2f1e1f0f4729d7c0cd5634354a4689d
fc27aeb4233534f6f7781dcfe57127a3908ae10fc025c5d86dc0682057f8b2fe
a66b6b8d5821b68f5b511e4f91e12025cd07d0fa6d0b71e722d825a2d6d878ca
657b89314fbaf6eee4acce24b3baf7e5fd2c5986a96ad85b08d90539cde869fe
fb01f21a0da0446b0bdf25a127ab19a6b06006acd8735f06a9ebfe34423fd7f5
b2fd5cbbb639f16e673bc484e5cca16b52a58bf2ab4bd62592e0c5408712ad7c
9ec2fdf900275daeac0980490c5c731cc7868b151ce1de5698f48418de4fa5f0
9ed3c317bf967d32133ad3a068ee4c56aae9784bc8b7da694482437f37dc1782
d5078c3fca3e6370043606ead7856e0b8fe67a9aab52c415769f29934c4d7f5d
163653848f002718d3deaa6ce48885483fc1f2e12e50e44a47477c73ccd91393
f2cffd43f2a5f491f4691f8694e6bc08239158e143ae7063dc04f0eb0259214a
0f94945121474cfdb6a9ab175914d3811ffbf08e6cc54082e14e473c755d18d8
9cb6a316989f7c7385e3ec2bd42ffe766ee126c70ef3466742849982ee1b0f0f
7e6761421fe944c2143eb897b983085891b421c148c6c17fb5cd8eaa9bdaa497
a59d662f1143596d56c452a1230b717ce43edf678207398c573a2503b0f72c91
137fa617a74ba8e73fd76bb1010c7a85d791aaa150006cb66faa04a83e9e730f
a29af1aa519d7ce726235ea2c2b38146d756290cda7a82d90c4d4438155b53e4
8bc93d8a7d1987dc86b14e22b1d8f42ec31da92c56edd9f312daf43f33a6a206
fd312e7fdd6cb5796df356a7f0314f124851dc149991e9fb02c5bed45cc4ba05
4d19bf368083c9a183cb0849f316ec17b62f859ca824c0586e779657efb6e6a6
b7103842ceb70848f9804f55c193d6a57f43174a587cba42b61b5c1bc4e1303d
422d3889fa20c238b7f97464c14df0bcf3328f189c294f41a3a334421dc560c7
a5be6aed7b84fc87ec42b5d24ba0b0d67f253a3906fcd99c13f4f7be5958fc00
5db924ca907e0d93acd975bd5079c3662717f9ac709f23d079bd8f816d29d9dd
62816173f9f6e136b20b48e3b6f16613ac9ea02b5603f636928b253244a548bd
cc43742bd24ae6bcdea343a91442f6f66aed2cfebcc6b235470204851ce2f8a9
"""
_PRO_0813 = """
74ff60e304294ef4482341d941dafcd0143e49fd3d4569f283b1e9020301c947
d7be184a5582a5a5a7b430c92572996ed8e43f2fe340f96b63a8dcd74ca3e52a
fc9291c02445cdb028315258f3bd9a65e336ebcfc45b74a5e0c78907b9ad7b47
6f2c6511e5cc9d611be87963ab95519ab38a565abba48c813dccac2208bc655b
453aeaf23b4c74f3b0429dc57c970620ff191c34957042aef63cc77511b2420e
9a1ea3ba51ace10663273f06d4913d72b003eeb657562f7ecec9cff4932f4026
1ac789c43cbfb74bf42ea06689cdc5bf1d609c74388f2a5bfbc700bae42255ce
b2e31dda0b244aca5ea1afb3e88541800dfeb3db6f135c1dc4fe9f75a3cde5a1
b2efb301a7e2eb7d5e186a336b30e55fe1df3d55f00490de8786fe05ded528ed
9f0d7228d9f90fb7f22b0dc357f736bdcb3918dad0133eb4377635f74ecdd6c6
9ff42cf9b6411918c85c4a99def2349c925024225abd900771d770fcbaf60dd7
c50346bb61a3999c4bbc1e16c683ea6ae01d7bafe1ccccc534ede8b472e1bbe1
e4fd1c5c65e0afd377687baeb5e9dce2774ef32198ad636ed69a82d073164942
a72fd0426270fd0fe15340363b212421dee09564f51b76a9f19d43778ee3aadc
ca601d33d249d8f4adcf30f66dd9cc2f38ff67f6ccfdce5661d8f7efe71fd994
f3ce6de8fbb5a4f59cd48eff77dacdabf39aff57cc43205c83565cfd7b3f113d
4af598f3672ab3dc55d063cfdc70227e879a8b593e3df53c5a60eacfaa06fd3b
0313cffc575c291b3359d971d9f0af6f8edb3a9ed5cf7f397550c034bb1be442
5ea603dbdab66ac815cff59e034b32f478754937c0425190a24e8d87c2895925
c3bb54f871d845254e24da6ad8816bde744e7f22d0ce2802a14cb59c35287453
516167a84b4b00313b7629139b3239af823caf622fc9ddd4c754a52aa74f15a4
df3975926bf3b11a637b24c346ab55ac28386d83498b41614a2c3070484093ad
e444e6d515480491b1fe64894d6185de170fb7987ce17e625f604d9e41ed639c
8690577cde635753a2a26f083aaa51af5dadee69d65d881bd1825aa46546d0e0
170edd2db317919af964fd08a719e381eb381d8bf62015d9a490e484d586cfb3
b3dcaa3372a42fc5a38e83a41d994647e4c35c8f259753c61b832cd4d82a94a8
50d385e1e247b309cc75914305e92f433fa0f6dc6ece895233bf9b3e713e3311
0449120425ee09db79420cb62e8a8f1aaad3ffeb623382f93355aadc0dd0f47f
37e8b8bcb4392adee55bc480059f10f842017fa9d1b179dd62ecdcdcacdb5027
f9bc11eef0b48e10d639b97f7d4df5cd521f79eb4765a53d6e9809f8e2dd3bdc
f115720429d749d20ab6f01c7af2b168728b3eabd703d399de1d304855cd13b1
7ac9402f531e2bf93ef9465a0e44a516f39ae58defdfb6ed667a608c40c40b62
dcb6e9370ec5bd283af59601447cbe8b9cae5297f9a4d746ebb7a89eb1e8b4ca
607f907a970aebb2fb5020955058f8bfd6bbfbf48334d597ad3e228fe43f66f4
ca4454ca96c52f4601cc375c7c41eb60921c54d99bc3fb2e1dc904c565b37d03
4ac44a65a92d0fda841f162e5c02343a079fdcdc48ef4f4afb5c30d6f984e910
6aad5ecd60cdbe6c8dca6bafa2aa776d748abc0b079c7f7c1984caf66747ef4b
b8e9376eeba09924844494a471b560b5ea53cf12bb78a1fbd17abd54760834b6
5182b6d508d4a5ba0ddfaecf6b9e35b69a54c369fed3e9f83521581fcbdb0d2a
dc91a11234ee0673db36daa759109ea5f42d1f54df256a7e48df2afab2fef017
1b446abc23a035807e6b55a195503daabb02e752fa424fbfe8f0530a944ce17d
5ec38fcfe3901cb3bc5b809d336c09f213d2e52cc5b80fde484becad16a117b1
a9279341f553af43e9ea63b06a0c61e2f6edd5ee224c3f228df2d3f5c62b5c01
ef67de8c818bc60d2d5b4aa652ee01afbea5fb2188f659bba6fc86af45ba00ba
5830f22254b598bf9a0f336bacd233791421d02e7d110db00c1872d5d9afa8be
22ae4fcc55b976724da9bd072096de540760f1eec3cff785e87621fd2d7060a4
30890437fc59315e6fa08fa8f045df3225fde77b15f586e0da5020d43f9fd4e9
877e6060d9c190230583ec56ce923a0b7f6c696f020fe3a9ab95fda0914e99b2
0527cff3c52ce82191e437b1ca8b858e1d3bbec6ed5ef52aac013cd2e6a85bee
52a94fd51d93b5e35e50ff431bce848292211b8528c6afeed4a6f0d34e23cce8
50044649fa7dd1c896c59ddbf633ca4557da50117bee8b0785956bdec3a72c85
086f263f3f493892fae50c2df53c53709125bd9a9cb040b52fc6a2b9dc975cd6
5e0264fd0c71e6174b023dc7d8180a491d3c5eac712ced8b213a73a83d003c1f
3f3adcbb18eae86cdc3195596a7236de204540fe508a1a3e5130deb5bfcb9362
5d4ab723dfabfa1a81f313ba8f3d53b46c32c49430ccfc0bbcced153adf098c1
409be8499d635bcbcd8663b58f0c2ec3c85b95753c0254b76af38f3688cfacb3
75146b06c0eb8879747a12d620fd44cc455051103c7b0a1a43fbcb0e61014d42
c3bbbde96d32b9c0ded912bce5015febb6ead1dc07d5be775a7a47e1920a3e28
2f5b62cd3111a031abc51cad6bc37b1b1e65131aa8e3540b05d5a4d0f288461a
0e4ac232d19396cf880db67d45c56a8164c17f2c2236ee4b53737047f2e38ead
dc3ef841f6278ce45a4c21b62fe91f257fee1cd0dec99e19e98d75f45f266c94
c8d8ecc7bc03fcd84752f0f2e16de3be28202e79f3632c4753295257ab02bd6d
56193a52a6fcc87629c7ca2f1d110140aa1e9a0cf49be5d21580f580a8e9cfc3
3869820fbd71ae92aa33de8fcf82b39b4535cf16a707ea640d5dacf5a5389103
09268dadf4bbe5e8c8d5b79ea645eb82b76e72c1e4ac9a63fa1bad07fd7f3ce7
40d4bf1620bd8397381cc3e75face996e3aa3cb5c928459ae31e79c1bdb30b63
"""
_INDEX = "model.safetensors.index.json"
_TOKENIZER = {
    "tokenizer.json": Published(6367146, "sha256:8f9f37ca37fdc4f5fd36d5cf4d3b0e8392edb4e894fd10cc0d70b4957c8633cf"),
    "tokenizer_config.json": Published(801, "sha256:6ac8c8dc065ed118161d02dd532749ae3f52c243deac27872134fae2f50d8547"),
}
_GENERATION = {
    "generation_config.json": Published(170, "sha256:5fccff80f55a4d455bbe516bdd552edf3e9623df95e99fbf2a3c3389fdf91af0")
}

RELEASES: dict[str, Release] = {
    r.name: r
    for r in (
        Release(
            VARIANTS["Flash"],
            "60d8d70770c6776ff598c94bb586a859a38244f1",
            {
                "config.json": Published(
                    1749, "sha256:b628e63398a645abc711d92207f8737dd8140f7a4ef1e0a5b3616019e0ddd818"
                ),
                _INDEX: Published(None, "sha256:7e975ba3bef8947a94e7da0abd60888375b232b4dfad883d59653e65c6ba522a"),
            },
            _shards(_FLASH),
            others={
                "sha256:52b5a1aa87606cb5be4f3158d706594edb1c4ce97ce6b1cd6079f15df075d7f5": (
                    "that of the launch day (24 April 2026), without expert_dtype"
                )
            },
        ),
        Release(
            VARIANTS["Flash-Base"],
            "8855555deef230a27a21a8d6f294b7b7497759b6",
            {"config.json": Published(), _INDEX: Published()},
            (Published(),) * 46,
            ordered=False,
        ),
        Release(
            VARIANTS["Flash-0731"],
            "7872f01b1d1fe23eabc4c98b48bffcef5a386062",
            {
                "config.json": Published(
                    1888, "sha256:6c8f3d2d3b48707541b88f32f22ef3f0f8a6b57d8523281e2b8d3cdb0ae9a023"
                ),
                _INDEX: Published(5602871, "sha256:98efab455cf08dfbbbaaba6f570e1bf10bf927d2b4c3c453a59c2f6f0e3be92b"),
                **_TOKENIZER,
                **_GENERATION,
            },
            _shards(_FLASH_0731),
        ),
        Release(
            VARIANTS["Pro"],
            "b5968e9190ef611bbf34a7229255be88a0e937c1",
            {
                "config.json": Published(
                    1828, "sha256:5fe4568daee51c208cb8a79538eaeda090ae011ade1dee2c386aa95f569c810e"
                ),
                _INDEX: Published(),
                **_TOKENIZER,
                **_GENERATION,
            },
            (Published(),) * 64,
        ),
        Release(
            VARIANTS["Pro-Base"],
            "98730c030fbdbaca4950788280a35c4642b208a9",
            {
                "config.json": Published(
                    1828, "sha256:718c188325de5ec90885a2782990b6e49fe773ef701c3aed03c55c8c21b99059"
                ),
                _INDEX: Published(),
            },
            (Published(),) * 64,
            ordered=False,
        ),
        Release(
            VARIANTS["Pro-0813"],
            "72e1d3230f6c080a530b0a1d46f8eb4602340597",
            {
                "config.json": Published(
                    1967, "sha256:9dd2a89255469e120b333668ef5a169b7ae46c00f6bbab786bf0be457546aec0"
                ),
                _INDEX: Published(11651606, "sha256:2de2ac1e43134f8b03bf6156067715b7c3c73b1a507329e606023c601a56d30a"),
                "LICENSE": Published(1084, "blob:d62e3bef9f054f21b7fc616365850fbf879a99ff"),
                "README.md": Published(7522, "blob:1036a5a34939182f5838147e851ac926ecad9a09"),
                "encoding/encoding_dsv4.py": Published(29001, "blob:66f2d30ece5a93e08fbab47aeb9f3541830930ef"),
                "generation_config.json": Published(170, "blob:c56a8c5bf06ff7740b6a33ee67b38b6237a230b1"),
                "inference/model.py": Published(45118, "blob:76122da98a9abd3ecab9e3e6d6ed181abcba3bee"),
                "tokenizer.json": Published(6367146, "blob:628e3364caad11bdf9e67cea06eae7878122811d"),
                "tokenizer_config.json": Published(801, "blob:f3dad388a2bbfd6a8605bd02754acd86d9ca5112"),
            },
            _shards(_PRO_0813),
        ),
        Release(
            VARIANTS["V4.1-Flash"],
            releases_v41.REVISION,
            {name: Published(*facts) for name, facts in releases_v41.FILES.items()},
            _shards(releases_v41.SHARDS),
        ),
    )
}
